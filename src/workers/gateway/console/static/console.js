// What is live is loaded anew and put in its place; everything else works without this file.
"use strict";

(() => {
  const find = document.getElementById("find");
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, textarea, select, [contenteditable]");
    if (event.key === "/" && find && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      find.focus();
      find.select();
    }
  });

  // A form that is on its way is not sent again (sent again it would do nothing more).
  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (form.method !== "post") return;
    if (form.dataset.sent) event.preventDefault();
    form.dataset.sent = "yes";
  });
  window.addEventListener("pageshow", () => {
    document.querySelectorAll("form[data-sent]").forEach((form) => delete form.dataset.sent);
  });

  const parts = () => [...document.querySelectorAll("[data-live]")];
  if (!parts().length) return;

  const pulse = document.createElement("div");
  const words = document.createElement("span");
  const button = document.createElement("button");
  pulse.className = "pulse";
  pulse.setAttribute("role", "group");
  pulse.setAttribute("aria-label", "Live updates");
  button.type = "button";
  pulse.append(words, button);
  document.querySelector("main").append(pulse);

  let paused = false;
  let timer = 0;
  let answered = new Date();

  const time = (moment) => moment.toISOString().slice(11, 19);

  function say(state, told) {
    pulse.dataset.state = state;
    words.textContent = told;
    button.textContent = paused ? "Resume" : "Pause";
    for (const part of parts()) part.toggleAttribute("data-stale", state === "stale");
  }

  function later() {
    clearTimeout(timer);
    const seconds = Math.min(...parts().map((part) => Number(part.dataset.live)));
    if (Number.isFinite(seconds) && !paused) timer = setTimeout(renew, seconds * 1000);
  }

  function put(part, fresh) {
    // What somebody is in, or opened, stays as it is.
    if (part.contains(document.activeElement)) return;
    const open = [...part.querySelectorAll("details")].map((one) => one.open);
    part.replaceChildren(...fresh.childNodes);
    part.querySelectorAll("details").forEach((one, place) => { if (place in open) one.open = open[place]; });
    if (!fresh.dataset.live) delete part.dataset.live;
  }

  async function renew() {
    if (document.hidden) return later();
    try {
      const answer = await fetch(location.href, { headers: { "x-live": "1" }, cache: "no-store", redirect: "error" });
      if (answer.status === 401) return say("stale", "Logged out: load the page anew");
      if (!answer.ok) throw new Error(String(answer.status));
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const part of parts()) {
        const fresh = page.getElementById(part.id);
        if (fresh) put(part, fresh);
      }
      answered = new Date();
      say("live", `Live · ${time(answered)}`);
      if (!parts().length) pulse.remove();
    } catch {
      say("stale", `No answer since ${time(answered)}`);
    }
    later();
  }

  button.addEventListener("click", () => {
    paused = !paused;
    say(paused ? "paused" : "live", paused ? `Paused · ${time(answered)}` : `Live · ${time(answered)}`);
    if (paused) clearTimeout(timer); else renew();
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden && !paused) renew(); });
  say("live", `Live · ${time(answered)}`);
  later();
})();
