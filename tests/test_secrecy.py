"""Secrets are said nowhere: the nets that hold them back, and the ears that would hear one that slipped through."""

import json
import logging
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from secrecy import FOLDER, MARK, planted
from workers import cli
from workers.redaction import INSTEAD, keep_secret, redact
from workers.settings import Settings, SettingsError, load_settings

HERE = Path(__file__).parent
SIGNATURE = f"t=1795000000,v1={'5f' * 32}"

# -- the ears ---------------------------------------------------------------------------------------------------------

CONFTEST = """
from secrecy import nothing_secret_is_said, pytest_runtest_makereport
"""
LEAKS = """
import asyncio, logging, os, subprocess, sys
import httpx, pytest, structlog
from secrecy import forbid, hear_response, planted

SECRET = planted("whatever")
log = structlog.get_logger()

def test_line():
    log.info("a_line", mail=[SECRET])
def test_named_by_another():
    forbid("another's", "hunter2hunter2")
    log.info("a_line", text="it is hunter2hunter2.")
def test_error():
    try:
        raise RuntimeError(f"cannot use {SECRET}")
    except RuntimeError as error:
        log.warning("an_error", text=str(error))
def test_library():
    logging.getLogger("aiokafka").error("sent %s", SECRET)
def test_printed():
    print("printed", SECRET)
def test_read(capsys):
    print("read", SECRET)
    capsys.readouterr()
def test_captured_line():
    with structlog.testing.capture_logs():
        log.info("captured", text=SECRET)
def test_child():
    subprocess.run([sys.executable, "-c", f"print('child', {SECRET!r})"], check=True, stdout=subprocess.DEVNULL)
def test_grandchild():
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], capture_output=True)"
    raised = f"raise SystemExit('grandchild ' + {SECRET!r})"
    subprocess.run([sys.executable, "-c", program, raised], check=True, env={**os.environ, "X": "1"})
def test_signature():
    log.info("signed", header=["t=1", "v1=" + "5f" * 31 + "5F"], cookie_of_whom="eyJpIjoi")
def test_deaf():
    subprocess.run([sys.executable, "-c", ""], check=True, env={"PATH": ""})
def test_answer():
    asyncio.run(hear_response(httpx.Response(200, text=SECRET, request=httpx.Request("GET", "http://h/page"))))
"""
HEARD = {
    "test_line": "the log line 'a_line' tells a planted secret",
    "test_named_by_another": "the log line 'a_line' tells another's",
    "test_error": "the log line 'an_error' tells a planted secret",
    "test_library": "the log line 'sent ",
    "test_printed": "Captured stdout call tells a planted secret behind 'printed '",
    "test_read": "standard output tells a planted secret behind 'read '",
    "test_captured_line": "the log line 'captured' tells a planted secret",
    "test_child": "tells a planted secret behind 'child '",
    "test_grandchild": "tells a planted secret behind 'grandchild '",
    "test_signature": "the log line 'signed' tells a signature or a session's cookie",
    "test_answer": "the answer of /page tells a planted secret",
    "test_deaf": "processes were started that nobody heard",
}


def test_a_secret_that_is_said_makes_the_run_red(tmp_path: Path) -> None:
    """Whoever says it, this process, a library, a child or a child's child: the run fails, and names test and place."""
    (tmp_path / "test_leaks.py").write_text(LEAKS)
    # The net behind the nets: with it in place a line would be clean whatever is done here.
    without_nets = "from workers import telemetry\ntelemetry.NETS = ()\n"
    (tmp_path / "conftest.py").write_text(without_nets + CONFTEST)
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, FOLDER: ""},
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=170,
    )  # fmt: skip

    assert done.returncode == 1, done.stdout
    missing = [name for name, told in HEARD.items() if told not in done.stdout]
    assert missing == [], re.sub(MARK, "…", done.stdout)


def test_the_suite_listens(nothing_secret_is_said: Any) -> None:
    """What this very session says is heard: its children write where the ears look, and its logs pass them."""
    before = nothing_secret_is_said.lines
    logging.getLogger("somebody").warning("something")
    subprocess.run([sys.executable, "-c", "print('heard')"], check=True, stdout=subprocess.DEVNULL)

    assert nothing_secret_is_said.lines > before
    said = [path.read_text(errors="replace") for path in Path(os.environ[FOLDER]).iterdir()]
    assert any(text.endswith("heard\n") for text in said)


# -- the nets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("postgres://u:c@n@db/x?a=1", "postgres://[secret]@db/x?a=1"),
        ("https://5f1c07d2@errors.example/1", "https://[secret]@errors.example/1"),
        ("dsn='host=db password=x1y2 user=u'", "dsn='host=db password=[secret] user=u'"),
        ("…?sslpassword=x1y2&b=1", "…?sslpassword=[secret]&b=1"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: [secret]"),
        ("{'authorization': 'Bearer x1y2', 'a': 1}", "{'authorization': [secret], 'a': 1}"),
        ("it was bearer x1y2z3 there", "it was [secret] there"),
        ("(b'stripe-signature', b't=1,v1=5f')", "(b'stripe-signature', [secret])"),
        (f"signed {SIGNATURE}", "signed t=1795000000,[secret]"),
        ("key sk_live_51H-a/b+c=", "key [secret]"),
        ("cookie: credits_session=a.b; theme=dark", "cookie: [secret]"),
        ('{"kafka_sasl_password": "x1 y2", "b": 1}', '{"kafka_sasl_password": [secret], "b": 1}'),
        ("eyJpIjoiYWJjZGVmZ2hpamtsbW5vcA.MTIzNDU2Nzg5MDEyMzQ1Njc4OTA", "[secret]"),
        # What tells a person what is wrong stays.
        ("password authentication failed for user u", "password authentication failed for user u"),
        ("CREDITS_ADMIN_TOKENS is not set", "CREDITS_ADMIN_TOKENS is not set"),
        ("such as postgresql://reader@old-host/app", "such as postgresql://reader@old-host/app"),
        ("http://a.b/c and x@y.z", "http://a.b/c and x@y.z"),
        ("idempotency key=k1, token unknown", "idempotency key=k1, token unknown"),
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_is_taken_out(said: str, told: str) -> None:
    """By its form or by the name before it; sentences about secrets stay whole."""
    assert redact(said) == told


def test_known_values_are_taken_out_in_every_form() -> None:
    """As they are, as an address writes them, as JSON writes them; a short one only where it stands alone."""
    keep_secret(['gehe"im/1 2', "kurz5"])

    said = 'a gehe"im/1 2, gehe%22im%2F1%202, gehe\\"im/1 2; kurz5 kurz57'
    assert redact(said) == f"a {INSTEAD}, {INSTEAD}, {INSTEAD}; {INSTEAD} kurz57"


# Whatever settings hold, by itself: lists, and of addresses the passwords.
HELD = {
    "database_url": f"postgresql://u:{planted('pass')}%21@h/d?sslpassword={planted('key')}",
    "stripe_webhook_secrets": f"{planted('a', 'whsec_')}, {planted('b', 'whsec_')}",
    "stripe_api_key": planted("api"),
    "read_tokens": planted("reader"),
    "admin_tokens": f"{planted('one')},{planted('two')}",
    "session_key": planted("session"),
    "kafka_sasl_password": planted("kafka"),
}


def test_settings_show_no_secret_and_know_them_all() -> None:
    """Neither repr, str, a dump, nor an error has one; every secret field is looked for by the nets."""
    settings = Settings(**HELD)
    secret_fields = {
        name
        for name, field in Settings.model_fields.items()
        if "SecretStr" in str(field.annotation)
    }
    assert secret_fields == HELD.keys()
    for shown in (
        repr(settings),
        str(settings),
        settings.model_dump_json(),
        str(settings.__dict__),
    ):
        assert MARK not in shown
    for value in HELD.values():
        assert MARK not in redact(f"it is {value}!"), value
    assert MARK not in redact(f"{planted('pass')}!")


@pytest.mark.parametrize("name", sorted(HELD))
def test_an_error_about_settings_quotes_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """A wrong variable beside them, a secret of a wrong type, and a secret where a number belongs."""
    for other, value in HELD.items():
        monkeypatch.setenv(f"CREDITS_{other.upper()}", value)
    for wrong in ({name: [planted("listed")]}, {"partitions": planted("number")}):
        with pytest.raises(SettingsError) as refused:
            load_settings(**wrong)
        assert MARK not in str(refused.value)
        assert f"CREDITS_{next(iter(wrong)).upper()}" in str(refused.value)


PROGRAM = """
import asyncio, gc, logging, sys, threading
import asyncpg, httpx, orjson, stripe, structlog
from aiokafka.errors import KafkaConnectionError, IllegalSaslStateError
from pydantic import BaseModel
from workers.settings import Settings
from workers.store.database import open_pool
from workers.telemetry import configure_logging

told = orjson.loads(sys.stdin.read())
settings = Settings(**told)
secrets = [part for value in told.values() for part in value.split(",")]
configure_logging(sys.argv[1])
log, library = structlog.get_logger("test"), logging.getLogger("aiokafka")

class Wanted(BaseModel):
    amount: int

def attempt(action):
    try:
        action()
    except Exception as error:
        log.exception("failed")
        log.warning("waiting", exc_info=error, text=str(error), raw=error)
        library.error("it broke: %s", error, exc_info=True)
        library.error(f"it broke: {error!r}")

def raising(error):
    def action():
        try:
            raise ValueError(error)
        except ValueError:
            raise error
    return action

for one in secrets:
    attempt(lambda: Wanted(amount=one))
    attempt(lambda: Wanted.model_validate({"amount": {"password": one}}))
    attempt(raising(KafkaConnectionError(f"sasl failed for {one}")))
    attempt(raising(IllegalSaslStateError(one)))
    attempt(raising(stripe.error.AuthenticationError(f"Invalid API Key provided: {one}")
                    if hasattr(stripe, "error") else stripe.AuthenticationError(f"Invalid API Key provided: {one}")))
    attempt(raising(OSError(111, f"Connect call failed {one}")))
    attempt(raising(RuntimeError({"headers": {"authorization": f"Bearer {one}"}})))
    attempt(lambda: asyncio.run(asyncpg.connect(f"postgresql://u:{one}@[broken/d")))
    attempt(lambda: asyncio.run(asyncpg.connect(f"postgresql://u:{one}@127.0.0.1:9/d?sslmode=nonsense")))
    attempt(lambda: asyncio.run(open_pool(f"postgresql://u:{one}@127.0.0.1:9/d")))
    attempt(lambda: httpx.get(f"http://u:{one}@127.0.0.1:9/{one}"))
    attempt(lambda: httpx.Headers({"authorization": "Bearer " + one + chr(8364)}))
    log.info("values", settings=settings, repr=repr(settings), deep=[{one: {"x": [one]}}], token=one, bytes=one.encode(),
             long="x" * 490 + one, url=f"http://h/?access_token={one}", headers=[("stripe-signature", one)])
    log.info(f"event {one}")
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received. %s", one)
    library.warning("cannot %d", one)  # a line that cannot be made
    thread = threading.Thread(target=raising(RuntimeError(one)))
    thread.start()
    thread.join()
    class Dying:
        def __del__(self, one=one):
            raise RuntimeError(one)
    del Dying
    gc.collect()

async def forgotten():
    asyncio.get_running_loop().create_task(asyncio.sleep(0)).add_done_callback(lambda _: 1 / 0)
    async def fails():
        raise RuntimeError(secrets[0])
    task = asyncio.create_task(fails(), name=secrets[0])
    await asyncio.sleep(0.01)
    del task
    gc.collect()

asyncio.run(forgotten())
raise RuntimeError("the end of " + secrets[0])
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_nobodys_exception_brings_a_secret_into_the_log(log_format: str) -> None:
    """Drivers, Stripe's library, pydantic, our own errors, tasks, threads and lines that cannot be made: no known secret
    is written, however it came into the text; and the process ends as Python ends with an error.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), log_format],
        input=json.dumps({**HELD, "database_url": f"postgresql://u:{planted('pass')}@h/d"}).encode(),
        capture_output=True, check=False, timeout=170,
    )  # fmt: skip

    said = (done.stdout + done.stderr).decode()
    assert MARK not in said, said[max(0, said.find(MARK) - 600) : said.find(MARK)]
    assert done.returncode == 1, said[-2000:]
    assert "log_line_lost" in said
    assert "uncaught" in said
    assert done.stderr == b""
    if log_format == "json":
        assert all(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://u:{}@127.0.0.1:9/d",
        "postgresql://u:{}@[broken/d",
        "postgresql://u:{}@127.0.0.1:port/d",
        "postgresql://u@127.0.0.1:9/d?password={}",
        "postgresql://u:{}@127.0.0.1:9/d?sslmode=nonsense",
        "postgresql://u:{}@127.0.0.1:9/d?sslmode=verify-full&sslrootcert=/none",
        "host=127.0.0.1 password={}",
        "{}",
    ],
)
@pytest.mark.parametrize("command", ["balance user:a", "check user:a", "migrate", "health"])
def test_a_wrong_address_is_told_without_its_password(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, address: str, command: str
) -> None:
    """Whatever is wrong with it: a sentence, or for a mistake of ours a traceback; no password in either."""
    monkeypatch.setenv("CREDITS_DATABASE_URL", address.format(planted("login")))
    monkeypatch.setenv("CREDITS_KAFKA_BOOTSTRAP", "127.0.0.1:9")
    monkeypatch.setattr(sys, "argv", ["credits", *command.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()

    told = capsys.readouterr()
    assert ended.value.code == 2, told.err
    assert MARK not in told.out + told.err
    assert "Traceback" not in told.err


def test_a_mistake_of_ours_is_told_without_what_it_quotes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traceback of a command keeps its frames and loses its secrets."""
    secret = planted("quoted")
    keep_secret([secret])

    def fails(_arguments: list[str]) -> int:
        raise KeyError(f"postgres://u:other@h/d and {secret}")

    monkeypatch.setattr(cli, "run", fails)
    with pytest.raises(SystemExit) as ended:
        cli.main()

    told = capsys.readouterr().err
    assert ended.value.code == 1
    assert "in fails" in told
    assert "other" not in told
    assert MARK not in told


def test_a_secret_is_not_taken_out_of_the_settings_themselves() -> None:
    """The nets are for what is said; what is used stays whole."""
    settings = Settings(**HELD)
    assert settings.administrator_tokens == (planted("one"), planted("two"))
    assert isinstance(settings.database_url, SecretStr)
    assert settings.database_url.get_secret_value() == HELD["database_url"]
