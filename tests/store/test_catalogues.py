"""R14: prices change while the worker works. Nothing is lost, nothing happens twice, and each entry names its version."""

import asyncio
from datetime import UTC, datetime, timedelta

import asyncpg
import orjson

from workers.batch import Ledger
from workers.ledger.catalogue import DEFAULT_CATALOGUE, parse_catalogue
from workers.ledger.model import Alert
from workers.store.database import open_pool

from .kit import (
    CATALOGUE,
    SOMEBODY_WAITS,
    complete,
    event,
    grant,
    invoice,
    ledger_over,
    money,
    outcomes,
    register,
    request,
    until,
)

DEARER = parse_catalogue(
    DEFAULT_CATALOGUE.replace("2026-11", "2026-12").replace("credits = 4 ", "credits = 5 ")
)
WITHOUT_PLANS = DEARER.model_copy(update={"version": "none", "plans": {}})
BY_MONTHS = parse_catalogue(
    DEFAULT_CATALOGUE.replace("2026-11", "months").replace(
        'rollover = "none"', 'allocation = "monthly" #'
    )
)
LOCK_ANN = "SELECT FROM accounts WHERE account_id = 'user:ann' FOR UPDATE"
START = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)


async def priced(connection: asyncpg.Connection, user: str = "ann") -> list[tuple[str, int, str]]:
    """An account's entries: kind, what changed, and the version that priced it."""
    rows = await connection.fetch(
        "SELECT kind, subscription_delta + purchased_delta - held_delta, catalogue_version "
        "FROM entries WHERE account_id = $1 ORDER BY version",
        f"user:{user}",
    )
    return [tuple(row) for row in rows]


async def test_a_batch_after_a_change_is_priced_by_it(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """The next request costs the new price, a completion is captured at it, and each entry says by which version."""
    await ledger.apply([register("ann"), grant("ann", 100), request("g1", "ann")])

    ledger.adopt(DEARER)
    await ledger.apply([request("g2", "ann"), complete("g1", "ann")])

    assert await priced(owner) == [
        ("promotion", 100, "2026-11"),
        ("generation_hold", -4, "2026-11"),
        ("generation_hold", -5, "2026-12"),
        ("generation_capture", -1, "2026-12"),
    ]


async def test_what_was_decided_stays_decided_under_other_prices(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A record that comes again after a change is the duplicate that it was; a refusal stays one, though it would pass now."""
    once = [
        register("ann"),
        grant("ann", 9),
        request("g1", "ann", units=2),
        request("g2", "ann", kind="video"),
        complete("g1", "ann"),
    ]
    first = await ledger.apply(once)
    assert outcomes(first) == {"applied": 4, "rejected": 1}
    before = await priced(owner)

    cheap = DEFAULT_CATALOGUE.replace("2026-11", "sale").replace("credits = 40", "credits = 1")
    ledger.adopt(parse_catalogue(cheap.replace("credits = 4 ", "credits = 1 ")))
    again = await ledger.apply(once)

    assert outcomes(again) == {"duplicate": 5}
    assert await priced(owner) == before


async def test_an_event_whose_price_the_catalogue_has_now_is_priced_by_it(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """The event's own claim counts while the catalogue has no price, and is ignored from the moment when it has one."""
    await ledger.apply([register("ann"), grant("ann", 100)])
    await ledger.apply([request("g1", "ann", kind="song", credits=7)])

    song = parse_catalogue(f"{DEFAULT_CATALOGUE}\n[generations.song]\ncredits = 9\n")
    ledger.adopt(song.model_copy(update={"version": "songs"}))
    await ledger.apply([request("g2", "ann", kind="song", credits=7)])

    assert (await priced(owner))[1:] == [
        ("generation_hold", -7, "2026-11"),
        ("generation_hold", -9, "songs"),
    ]


async def test_a_batch_keeps_the_catalogue_that_it_was_read_with(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """An invoice read while its plan was sold is granted by that plan, although it is sold no more when locks are there."""
    await ledger.apply([register("ann")])
    paid = invoice(
        "in_1", "sub_1", "cus_1", start=START, end=START + timedelta(days=30), user="ann"
    )
    async with owner.transaction():
        await owner.execute(LOCK_ANN)
        applying = asyncio.create_task(ledger.apply([paid]))
        await until(owner, SOMEBODY_WAITS)
        ledger.adopt(WITHOUT_PLANS)

    assert outcomes(await applying) == {"applied": 1}
    assert await priced(owner) == [("subscription_grant", 800, "2026-11")]


async def test_a_batch_that_waits_for_a_connection_keeps_its_catalogue(
    database_url: str, owner: asyncpg.Connection
) -> None:
    """The same when the change comes between the reading of a batch and its transaction."""
    paid = invoice(
        "in_1", "sub_1", "cus_1", start=START, end=START + timedelta(days=30), user="ann"
    )
    async with await open_pool(database_url, size_max=1, name="tests") as pool:
        ledger = ledger_over(pool)
        async with pool.acquire():
            applying = asyncio.create_task(ledger.apply([paid]))
            await asyncio.sleep(
                0
            )  # its first step: it has read the record, and there is no connection
            ledger.adopt(WITHOUT_PLANS)

        assert outcomes(await applying) == {"applied": 1}
    assert await priced(owner) == [("subscription_grant", 800, "2026-11")]


async def test_an_invoice_whose_plan_is_allocated_otherwise_now_grants_once(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """The second event of a paid invoice finds what the first one granted, whatever the catalogue makes of its line today."""
    period = {"start": START, "end": START + timedelta(days=365), "user": "ann"}
    await ledger.apply([register("ann"), invoice("in_1", "sub_1", "cus_1", **period)])

    ledger.adopt(BY_MONTHS)
    report = await ledger.apply([invoice("in_1", "sub_1", "cus_1", **period)])

    assert outcomes(report) == {"duplicate": 1}
    assert await money(owner, "ann") == (800, 0, 0, 0)


async def test_what_was_parked_is_priced_when_it_is_applied(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """An invoice that waited for its owner is granted by the catalogue in force when the owner is known."""
    await ledger.apply(
        [invoice("in_1", "sub_1", "cus_1", start=START, end=START + timedelta(days=30))]
    )

    text = DEFAULT_CATALOGUE.replace("2026-11", "2026-12").replace("credits = 800", "credits = 900")
    ledger.adopt(parse_catalogue(text))
    linked = event("user.created", user_id="ann", tier="pro", external_ids={"stripe": "cus_1"})
    await ledger.apply([linked])
    await owner.execute("UPDATE parked SET next_attempt_at = now()")
    await ledger.apply_parked(10)

    assert await priced(owner) == [("subscription_grant", 900, "2026-12")]


async def test_an_alert_of_no_record_is_published(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """That a catalogue was refused is told as critical, with what stays in force; it changes no account."""
    details = {"kept_version": CATALOGUE.version, "problems": ["3:1: credits is 0"]}

    await ledger.tell(Alert("catalogue_refused", None, "a message", details, {}))

    (row,) = await owner.fetch("SELECT type, payload FROM outbox")
    told = orjson.loads(row["payload"])
    assert row["type"] == "credit.alert"
    assert (told["code"], told["severity"]) == ("catalogue_refused", "critical")
    assert (told["account_id"], told["details"]) == (None, details)
    assert await owner.fetchval("SELECT count(*) FROM accounts") == 0
