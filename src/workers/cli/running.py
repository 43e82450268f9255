"""Run the parts of a deployment, and prepare its servers."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workers.cli.reaching import keep_libraries_quiet, operator_settings
from workers.cli.shared import OPTIONS, PROBLEMS, WELL, Json, UnusableError
from workers.cli.telling import tell
from workers.up.reach import database_reached, kafka_reached

if TYPE_CHECKING:
    from workers.settings import Settings


commands = typer.Typer(**OPTIONS)


@commands.command()
def up(
    story: Annotated[
        bool, typer.Option(help="Play a small story of purchases and spending.")
    ] = True,
    picture: Annotated[Path | None, typer.Option(hidden=True)] = None,
    as_json: Json = False,
) -> int:
    """Start servers, worker and gateway, and show what happens until Ctrl-C."""
    from workers.settings import load_settings
    from workers.up.run import Options, bring_up

    keep_libraries_quiet()
    return bring_up(load_settings(), Options(story=story, picture=picture, as_json=as_json))


@commands.command()
def worker(as_json: Json = False) -> int:
    """Apply events to the ledger until told to stop."""
    import gc

    from workers.worker import serve_worker

    # A batch makes some hundred thousand objects and lets go of all of them: looking for cycles among them at the
    # usual rate took a quarter of the worker's time. What is imported by now stays for good.
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)
    return _serve(serve_worker, "worker", as_json=as_json)


@commands.command()
def gateway(as_json: Json = False) -> int:
    """Take webhooks and answer questions over HTTP until told to stop."""
    from workers.gateway import serve_gateway

    return _serve(serve_gateway, "gateway", as_json=as_json)


@commands.command()
def migrate(as_json: Json = False) -> int:
    """Bring the database's schema up to date."""
    from workers.settings import require
    from workers.store.migrations import migrate as apply

    url = require(operator_settings().database_url, "database_url")
    with database_reached(url, role="credits_owner"):
        applied = asyncio.run(apply(url))
    tell(
        {"applied": applied},
        as_json,
        f"Applied {', '.join(applied)}." if applied else "The schema is up to date.",
    )
    return WELL


@commands.command()
def topics(as_json: Json = False) -> int:
    """Create the Kafka topics that are missing, and tell which are not set as they should be."""
    from workers.topics import ensure_topics, unfit_topics

    settings = operator_settings()

    async def ensure_and_look() -> tuple[list[str], list[str]]:
        return await ensure_topics(settings), await unfit_topics(settings)

    with kafka_reached(settings.kafka_bootstrap):
        created, unfit = asyncio.run(ensure_and_look())
    done = f"Created {', '.join(created)}." if created else "All topics are there."
    tell({"created": created, "unfit": unfit}, as_json, "\n".join([done, *unfit]))
    return PROBLEMS if unfit else WELL


def _serve(
    serve: "Callable[[Settings], Coroutine[Any, Any, None]]", part: str, *, as_json: bool
) -> int:
    """Run a part of the deployment until it is told to stop."""
    import uvloop

    from workers.settings import load_settings
    from workers.telemetry import configure_logging
    from workers.tracing import TracingError, configure_tracing
    from workers.up.processes import end_with_supervisor

    settings = load_settings()
    configure_logging("json" if as_json else settings.log_format)
    try:
        end_tracing = configure_tracing(f"credit-workers-{part}", settings.traces_file)
    except TracingError as error:
        raise UnusableError(str(error)) from error
    end_with_supervisor()
    try:
        uvloop.run(serve(settings))
    finally:
        end_tracing()
    return WELL
