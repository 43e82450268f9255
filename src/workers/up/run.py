"""One run of the stack, from the first step to the last process gone.

Invariants: a signal, at any moment and any number of times, leads to the same orderly end; whatever fails, what was
started is stopped before the failure is told.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.settings import Settings
from workers.up.output import Output, credits_command
from workers.up.stack_file import Stack
from workers.up.supervisor import Supervisor, in_thread, sole_use

if TYPE_CHECKING:
    from workers.up.watch import Picture, Watcher

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The supervisor's own bounds come before; past this the process ends, and with it every pipe that its children
# and the servers' guardians watch, so that they end themselves.
STOP_SECONDS_MAX = 28.0
PICTURE_TRICKLE_SECONDS = 1.5
SCREEN_CLOSE_SECONDS = 2.0
COUNT_SECONDS_MAX = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked of this run."""

    story: bool = True
    as_json: bool = False
    picture: Path | None = None


def bring_up(settings: Settings, options: Options) -> int:
    """Run the stack until a signal ends it. Returns the exit status: 0 for an end that was asked for.

    Raises StackError, SettingsError, EmbeddedError, MigrationError, UnreachableError; everything that was started
    has been stopped by then.
    """
    output = Output(as_json=options.as_json)
    try:
        with sole_use(settings.home.absolute()):
            return asyncio.run(_run(settings, options, output))
    finally:
        for number in STOP_SIGNALS:
            signal.signal(
                number, signal.SIG_IGN
            )  # all is stopped: a late signal has nothing to say
        output.close()


async def _run(settings: Settings, options: Options, output: Output) -> int:
    begun = time.monotonic()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    supervisor = Supervisor(settings, say=output.say)
    try:
        if not await _unless(stop, supervisor.start()):
            return 0
        output.ready(
            supervisor.stack,
            time.monotonic() - begun,
            home=supervisor.home,
            secrets_shown=supervisor.secrets_shown,
        )
        await _unless(stop, _both(supervisor.watch(), _show(supervisor, options, output)))
    finally:
        output.show_on(None)
        tell = output.say if supervisor.has_begun else _silent
        tell("Stopping")
        stopping = time.monotonic()
        try:
            await asyncio.wait_for(supervisor.stop(), STOP_SECONDS_MAX)
        except TimeoutError:
            output.say("Something does not stop in time; it is cut off as this process ends")
            output.close()
            os._exit(1)
        tell(f"Stopped in {time.monotonic() - stopping:.1f} s; nothing is left running")
    return 0


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Run `work` to its end, or cancel it when `stop` is set first. False in the second case."""
    task = asyncio.create_task(work)
    waiter = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        for one in (task, waiter):
            one.cancel()
        await asyncio.gather(task, waiter, return_exceptions=True)


async def _both(first: Coroutine[Any, Any, None], second: Coroutine[Any, Any, None]) -> None:
    """Run two things until either ends or fails; then end the other."""
    tasks = [asyncio.create_task(first), asyncio.create_task(second)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _show(supervisor: Supervisor, options: Options, output: Output) -> None:
    """The view and the story, until cancelled; with a picture asked for, until that is written."""
    from workers.up.watch import Watcher

    settings, stack = supervisor.child_settings(), supervisor.stack
    on_screen = sys.stdout.isatty() and not options.as_json and options.picture is None
    async with _dead_letter_count(stack) as count:
        watcher = Watcher(
            settings,
            stack,
            count_dead_letters=count,
            on_change=None if on_screen else output.change,
        )
        if "admin_token" not in supervisor.secrets_shown:
            watcher.picture.admin_token = ""
        try:
            await watcher.start()
            async with _screen(watcher.picture, output) if on_screen else contextlib.nullcontext():
                await _both(watcher.run(), _play(settings, stack, watcher, options, output))
        finally:
            await watcher.stop()


async def _play(
    settings: Settings, stack: Stack, watcher: "Watcher", options: Options, output: Output
) -> None:
    """The story, if it is wanted and can be played; then nothing, until cancelled or the picture is taken."""
    if options.story and not _sells_what_the_story_buys(settings):
        output.say("The story is not played: it buys what only the built-in catalogue sells")
    elif options.story:
        from workers.up.story import PEOPLE, tell

        await watcher.read(f"user:{person}" for person in PEOPLE)
        async with tell(settings, stack, watcher) as story:
            await story.script()
            if options.picture is None:
                await story.trickle()
            try:
                await asyncio.wait_for(story.trickle(), PICTURE_TRICKLE_SECONDS)
            except TimeoutError:
                pass
    if options.picture is None:
        await asyncio.Event().wait()
        return
    from workers.up.live import render_svg

    watcher.picture.note = ""
    options.picture.write_text(
        render_svg(watcher.picture, hint="credits balance user:ada"), encoding="utf-8"
    )
    output.say(f"The picture is in {options.picture}")


def _sells_what_the_story_buys(settings: Settings) -> bool:
    from workers.up.story import PACK_CENTS, PLAN_PRICES

    catalogue = settings.load_catalogue()
    return PACK_CENTS.keys() <= catalogue.packs.keys() and all(
        catalogue.plan_of_price(price) for price, _, _ in PLAN_PRICES.values()
    )


@contextlib.asynccontextmanager
async def _screen(picture: "Picture", output: Output) -> AsyncIterator[None]:
    """Cover the terminal with the live view, and give it back whatever happens, unless it no longer answers."""
    from rich.console import Console

    from workers.up.live import Screen

    def note(sentence: str) -> None:
        picture.note = sentence

    await in_thread(output.flush)
    screen = Screen(Console(), picture, hint=_hint())
    output.show_on(note)
    screen.open()
    try:
        yield
    finally:
        try:
            await asyncio.wait_for(in_thread(screen.close), SCREEN_CLOSE_SECONDS)
        except (TimeoutError, OSError):
            pass
        output.show_on(None)


@contextlib.asynccontextmanager
async def _dead_letter_count(stack: Stack) -> AsyncIterator[Callable[[], Awaitable[int | None]]]:
    """A function that counts dead letters; it returns None while the database does not answer."""
    import asyncpg

    from workers.operations.dead_letters import count_dead
    from workers.store.database import open_pool

    unanswered = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)
    pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def count() -> int | None:
        nonlocal pool
        try:
            if pool is None:
                pool = await open_pool(stack.database_url, size_max=1, name="credits-live-view")
            return await asyncio.wait_for(count_dead(pool), COUNT_SECONDS_MAX)
        except unanswered:
            return None

    try:
        yield count
    finally:
        if pool is not None:
            pool.terminate()


def _silent(_sentence: str) -> None:
    pass


def _hint() -> str:
    return f"{credits_command()} balance user:ada"
