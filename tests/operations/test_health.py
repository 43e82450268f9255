"""A look at a deployment: each thing that needs a hand is found and named, a healthy deployment is told so."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from tests.store.kit import (
    adjust,
    book,
    complete,
    event,
    grant,
    invoice,
    ledger_over,
    pack,
    record,
    register,
    request,
)

from workers.batch import Ledger
from workers.operations import health as module
from workers.operations.health import Check, Health, judge_lag, look
from workers.operations.lag import Unanswered, lags
from workers.rights import group_of
from workers.settings import INBOUND_TOPICS, Settings, load_settings
from workers.store.database import open_pool
from workers.store.reads import Pool
from workers.topics import ensure_topics

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
NAMES = [
    "paid_without_credits",
    "unmapped_ids",
    "failed_debits",
    "integrity",
    "late",
    "outbox",
    "lag",
    "workers",
    "patrol",
    "dead_letters",
    "parked",
]


@dataclass
class Deployment:
    """A database that a worker beats over, and a superuser who can do to it what no worker would."""

    pool: Pool
    ledger: Ledger
    owner: asyncpg.Connection

    async def look(self) -> Health:
        """All checks, without Kafka."""
        return await look(self.pool, None)

    async def found(self, name: str) -> Check:
        """One check, after making sure that no other one is a problem."""
        health = await self.look()
        checks = {check.name: check for check in health.checks}
        others = {other: check.state for other, check in checks.items() if other != name}
        assert set(others.values()) <= {"ok", "unknown"}, others
        assert health.healthy is (checks[name].state in {"ok", "unknown"})
        return checks[name]

    async def published(self) -> None:
        """As after a relay at work."""
        await self.owner.execute("DELETE FROM outbox")

    async def apply(self, *works: Any) -> None:
        """Let the worker apply records and publish what they cause."""
        await self.ledger.apply(list(works))
        await self.published()

    async def spoil(self, statement: str, *arguments: Any) -> None:
        """Change rows past every protection."""
        await self.owner.execute("SET session_replication_role = replica")
        for table in ("accounts", "entries", "lots"):
            await self.owner.execute(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
        await self.owner.execute(statement, *arguments)


@pytest.fixture
async def deployment(database_url: str) -> AsyncIterator[Deployment]:
    """One that is well."""
    settings = {"search_path": "credits", "timezone": "UTC"}
    owner = await asyncpg.connect(database_url, server_settings=settings)
    await owner.execute(
        "INSERT INTO heartbeats SELECT gen_random_uuid(), 1, $1, now() + interval '1 h', now()",
        list(INBOUND_TOPICS),
    )
    await owner.execute("UPDATE patrol SET read_until = now() - interval '25 s'")
    async with await open_pool(database_url, size_max=2, name="tests") as pool:
        yield Deployment(pool, ledger_over(pool), owner)
    await owner.close()


async def test_a_healthy_deployment_is_told_so(deployment: Deployment) -> None:
    """Paying people with credits, a fresh outbox, refusals that are somebody's own doing: nothing needs a hand."""
    await deployment.apply(
        register("ada"),
        grant("ada", 50),
        request("g1", "ada"),
        event("user.created", user_id="bob"),
        adjust("bob", -1000),
    )
    await deployment.ledger.apply([grant("ada", 1)])

    health = await deployment.look()

    assert health.healthy
    assert health.verdict == "All is well (unknown: lag)."
    assert [check.name for check in health.checks] == NAMES
    assert {check.name: check.state for check in health.checks} == {
        **dict.fromkeys(NAMES, "ok"),
        "lag": "unknown",
    }
    assert health.seconds < module.HEALTH_SECONDS_MAX


# -- accounts ----------------------------------------------------------------------------------------------------


async def test_a_paid_account_that_was_never_granted_anything_is_critical(
    deployment: Deployment,
) -> None:
    """Somebody pays and has nothing: the account is named; free ones and those with credits are not."""
    await deployment.apply(
        register("ada"), register("bob"), grant("bob", 5), event("user.created", user_id="cy")
    )

    check = await deployment.found("paid_without_credits")

    assert (check.state, check.found) == ("critical", 1)
    (finding,) = check.findings
    assert finding.account_id == "user:ada"
    assert "nothing was ever granted" in finding.message


async def test_a_paid_account_that_spent_its_last_credit_is_no_problem(
    deployment: Deployment,
) -> None:
    """It is told, because somebody may ask; nobody need get up for it."""
    await deployment.apply(register("ada"), grant("ada", 4), complete("g1", "ada", kind="image"))

    check = await deployment.found("paid_without_credits")

    assert (check.state, check.found) == ("ok", 0)
    assert check.findings[0].account_id == "user:ada"
    assert "1 have spent all they had" in check.message


async def test_those_who_spent_never_hide_those_who_got_nothing(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where not all can be judged, who never had a credit comes first; and nothing found in a part is not called well."""
    spent = [grant("zoe", 4), complete("g1", "zoe", kind="image")]
    await deployment.apply(register("zoe"), register("bob"), *spent, grant("bob", 4))
    await deployment.apply(complete("g2", "bob", kind="image"))
    monkeypatch.setattr(module, "EMPTY_MAX", 2)
    assert (await deployment.found("paid_without_credits")).state == "unknown"

    await deployment.apply(register("ada"))

    check = await deployment.found("paid_without_credits")
    assert (check.state, check.findings[0].account_id) == ("critical", "user:ada")


@pytest.mark.parametrize(
    ("start", "end", "state"),
    [
        (timedelta(days=-40), timedelta(days=-10), "critical"),  # not renewed
        (timedelta(days=-40), timedelta(hours=-1), "ok"),  # Stripe will tell within the hour
        (timedelta(days=-10), timedelta(days=20), "critical"),  # renewed, and nothing granted since
        (timedelta(hours=-1), timedelta(days=30), "ok"),  # its invoice is on its way
    ],
)
async def test_a_paid_account_whose_period_brought_nothing_is_critical(
    deployment: Deployment, start: timedelta, end: timedelta, state: str
) -> None:
    """All was spent in an earlier period: that explains nothing once the next one should have been paid."""
    await deployment.apply(
        invoice("in_1", "sub_1", "cus_ada", start=NOW - DAY, end=NOW + 29 * DAY, user="ada"),
        book("b1", "ada", "bob", 800),
    )
    await deployment.spoil(
        "UPDATE entries SET recorded_at = recorded_at - interval '30 d' WHERE account_id = 'user:ada'"
    )
    await deployment.owner.execute(
        "UPDATE subscriptions SET period_start = $1, period_end = $2", NOW + start, NOW + end
    )

    check = await deployment.found("paid_without_credits")

    assert (check.state, check.findings[0].account_id) == (state, "user:ada")


async def test_credits_that_were_taken_away_do_not_count_as_spent(deployment: Deployment) -> None:
    """A paid account that an operator or a dispute emptied has spent nothing."""
    await deployment.apply(register("ada"), grant("ada", 4), adjust("ada", -4))

    check = await deployment.found("paid_without_credits")

    assert check.state == "critical"
    assert "adjustment" in check.findings[0].message


async def test_refusals_of_the_last_hour_are_counted_by_reason(deployment: Deployment) -> None:
    """The customer's own (no credits) are told without alarm; older ones are not told."""
    await deployment.apply(grant("ada", 1), request("g0", "ada", units=9))
    await deployment.owner.execute("UPDATE commands SET recorded_at = now() - interval '61 min'")
    await deployment.apply(request("g1", "ada"), request("g2", "ada"))

    check = await deployment.found("failed_debits")

    assert (check.state, check.found) == ("ok", 2)
    assert "2 insufficient_credits" in check.message
    (finding,) = check.findings
    assert finding.account_id == "user:ada"
    assert "4 needed, 1 available" in finding.message


async def test_a_refusal_that_is_no_customers_doing_is_a_warning(deployment: Deployment) -> None:
    """A kind that the catalogue does not sell: the account that was refused is named."""
    await deployment.apply(grant("ada", 100), request("g1", "ada", kind="hologram"))

    check = await deployment.found("failed_debits")

    assert check.state == "warning"
    assert check.findings[0].account_id == "user:ada"
    assert "unknown_price" in check.findings[0].message


async def test_a_daily_limit_on_a_paid_plan_is_a_warning(deployment: Deployment) -> None:
    """Who pays has no daily limit: the refusal came before the tier, or the tier is wrong."""
    await deployment.apply(
        grant("ada", 100), *(request(f"g{number}", "ada") for number in range(4))
    )
    assert (await deployment.found("failed_debits")).state == "ok"
    await deployment.apply(register("ada"))

    check = await deployment.found("failed_debits")

    assert (check.state, check.findings[0].account_id) == ("warning", "user:ada")
    assert "although its tier is pro now" in check.findings[0].message


@pytest.mark.parametrize(
    ("statement", "field"),
    [
        ("UPDATE accounts SET purchased = purchased + 5 WHERE account_id = 'user:ada'", "purchased (lots)"),
        ("UPDATE lots SET remaining = remaining - 1 WHERE account_id = 'user:ada'", "purchased (lots)"),
        ("UPDATE accounts SET chain_hash = 'x' WHERE account_id = 'user:ada'", "chain_hash"),
        ("UPDATE accounts SET version = 9 WHERE account_id = 'user:ada'", "version"),
        ("DELETE FROM entries WHERE account_id = 'user:ada' AND version = 2", "version 3, version"),
        ("UPDATE entries SET previous_hash = 'x' WHERE account_id = 'user:ada' AND version = 2", "version 2, previous_hash"),
        ("UPDATE entries SET balance_before = 7, balance_after = 6 WHERE account_id = 'user:ada' AND version = 2", "version 2, balance_before"),
        ("DELETE FROM accounts WHERE account_id = 'user:ada'", "account"),
    ],
)  # fmt: skip
async def test_books_that_do_not_add_up_are_critical(
    deployment: Deployment, statement: str, field: str
) -> None:
    """Of what changed lately: totals are lots and journal, entries hang together. The others' books are not blamed."""
    await deployment.apply(
        grant("ada", 9), adjust("ada", -1), adjust("ada", -2), grant("bob", 9), adjust("bob", -1)
    )
    assert (await deployment.found("integrity")).state == "ok"
    await deployment.spoil(
        f"ALTER TABLE entries DROP CONSTRAINT before_and_after_add_up; ALTER TABLE entries DROP CONSTRAINT pools_are_the_balance; {statement}"
    )

    check = await deployment.found("integrity")

    assert check.state == "critical"
    assert {finding.account_id for finding in check.findings} == {"user:ada"}
    assert field in {finding.subject for finding in check.findings}
    assert check.message.startswith("1 of 2 accounts that changed in the last hour")


async def test_debt_beside_unheld_credits_is_critical(deployment: Deployment) -> None:
    """What comes in pays debt first: both at once are a defect."""
    await deployment.apply(grant("ada", 9))
    await deployment.spoil(
        "ALTER TABLE accounts DROP CONSTRAINT debt_takes_unheld_credits_first; "
        "UPDATE accounts SET debt = 3; UPDATE entries SET debt_after = 3"
    )

    check = await deployment.found("integrity")

    assert [finding.subject for finding in check.findings] == ["unheld credits beside debt"]


@pytest.mark.parametrize(
    ("statement", "subject"),
    [
        ("UPDATE generations SET deadline_at = now() - interval '5 min'", "hold g1"),
        ("UPDATE lots SET expires_at = now() - interval '5 min' WHERE pool = 'subscription'", "lot "),
        ("UPDATE accounts SET allocate_at = now() - interval '5 min'", "month user:ada"),
    ],
)  # fmt: skip
async def test_what_time_should_have_done_is_a_warning(
    deployment: Deployment, statement: str, subject: str
) -> None:
    """An expired lot that is still live, a hold past its deadline, a month that was not granted."""
    expires = (NOW + DAY).isoformat()
    await deployment.apply(
        register("ada"),
        grant("ada", 50),
        request("g1", "ada"),
        grant("ada", 9, pool="subscription", expires_at=expires),
    )
    assert (await deployment.found("late")).state == "ok"
    await deployment.spoil(statement)

    check = await deployment.found("late")

    assert (check.state, check.found) == ("warning", 1)
    assert check.findings[0].account_id == "user:ada"
    assert check.findings[0].subject.startswith(subject)


# -- messages ----------------------------------------------------------------------------------------------------


async def test_a_message_that_waits_for_an_identity_is_a_warning(deployment: Deployment) -> None:
    """The unmapped id is named, the oldest first."""
    await deployment.apply(pack("cs_1", "cus_first"), pack("cs_2", "cus_second"))

    check = await deployment.found("unmapped_ids")

    assert (check.state, check.found) == ("warning", 2)
    assert [finding.subject for finding in check.findings] == [
        "stripe cus_first",
        "stripe cus_second",
    ]


async def test_what_waits_past_half_of_its_deadline_is_a_warning(deployment: Deployment) -> None:
    """Until it is a dead letter there is half of the time left to do something."""
    await deployment.apply(pack("cs_1", "cus_first"))
    await deployment.owner.execute(
        "UPDATE parked SET provider = 'stripe_api', parked_at = parked_at - interval '31 min', "
        "deadline_at = deadline_at - interval '31 min'"
    )

    check = await deployment.found("parked")

    assert (check.state, check.found) == ("warning", 1)
    assert "cus_first" in check.findings[0].message


async def test_messages_beyond_those_that_were_read_are_not_called_well(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what the rest waits for."""
    await deployment.apply(pack("cs_1", "cus_first"), pack("cs_2", "cus_second"))
    await deployment.owner.execute("UPDATE parked SET provider = 'stripe_api'")
    assert (await deployment.look()).healthy
    monkeypatch.setattr(module, "ROWS_MAX", 2)
    health = await deployment.look()
    unknown = {check.name for check in health.checks if check.state == "unknown"}
    assert unknown == {"unmapped_ids", "parked", "lag"}


async def test_a_row_that_nobody_publishes_is_a_warning(deployment: Deployment) -> None:
    """By the age of the oldest, with its account; a fresh one is a ledger at work."""
    await deployment.ledger.apply([grant("ada", 5)])
    assert (await deployment.found("outbox")).state == "ok"
    made = datetime.now(UTC) - timedelta(minutes=5)
    old = f"{int(made.timestamp() * 1000):012x}7000800000000000{'0' * 4}"
    await deployment.owner.execute("UPDATE outbox SET id = $1::uuid", old)

    check = await deployment.found("outbox")

    assert check.state == "warning"
    assert check.findings[0].account_id == "user:ada"
    assert "5 min old" in check.message


async def test_a_row_that_no_worker_wrote_is_a_warning(deployment: Deployment) -> None:
    """Its id is none of ours, so that its age is unknown."""
    await deployment.ledger.apply([grant("ada", 5)])
    await deployment.owner.execute("UPDATE outbox SET id = gen_random_uuid()")

    check = await deployment.found("outbox")

    assert (check.state, check.findings[0].account_id) == ("warning", "user:ada")


async def test_dead_letters_are_a_warning_by_reason(deployment: Deployment) -> None:
    """Those that wait for a person; what was discarded does not count."""
    await deployment.apply(*(record("booking.events", b"{", {}) for _ in range(3)))
    await deployment.owner.execute(
        "UPDATE dead_letters SET state = 'discarded' WHERE dead_letter_id = (SELECT min(dead_letter_id) FROM dead_letters)"
    )

    check = await deployment.found("dead_letters")

    assert (check.state, check.found) == ("warning", 2)
    assert check.message == "2 dead letters: 2 malformed"
    assert check.findings[0].message.startswith("2 malformed: ")


async def test_many_dead_letters_do_not_hide_one_of_another_reason(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reason is counted for itself."""
    monkeypatch.setattr(module, "ROWS_MAX", 2)
    await deployment.apply(*(record("booking.events", b"{", {}) for _ in range(4)))
    await deployment.owner.execute(
        "UPDATE dead_letters SET reason = 'unresolved' WHERE dead_letter_id = (SELECT max(dead_letter_id) FROM dead_letters)"
    )
    health = await deployment.look()
    (check,) = (check for check in health.checks if check.name == "dead_letters")
    assert check.message == "3 dead letters: at least 2 malformed, 1 unresolved"


# -- processes ---------------------------------------------------------------------------------------------------


async def test_a_topic_that_no_live_worker_consumes_is_critical(deployment: Deployment) -> None:
    """A worker that was last heard of minutes ago consumes nothing."""
    await deployment.owner.execute(
        "UPDATE heartbeats SET topics = $1", [t for t in INBOUND_TOPICS if t != "booking.events"]
    )
    await deployment.owner.execute(
        "INSERT INTO heartbeats VALUES (gen_random_uuid(), 77, $1, now() - interval '3 min', now())",
        list(INBOUND_TOPICS),
    )

    check = await deployment.found("workers")

    assert check.state == "critical"
    assert [finding.subject for finding in check.findings if finding.state == "critical"] == [
        "booking.events"
    ]
    assert any("pid 77" in finding.message for finding in check.findings)


async def test_a_patrol_that_stands_still_is_a_warning(deployment: Deployment) -> None:
    """Unusual patterns are not told meanwhile."""
    await deployment.owner.execute("UPDATE patrol SET read_until = now() - interval '10 min'")

    check = await deployment.found("patrol")

    assert check.state == "warning"
    assert "10 min behind" in check.message


async def test_a_question_that_is_not_answered_in_time_is_a_warning(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence is never "all is well", and the questions after it are answered."""
    monkeypatch.setattr(module, "PATROL", "SELECT 1::float8 FROM pg_sleep(60)")
    monkeypatch.setattr(module, "QUESTION_SECONDS_MAX", 0.3)

    check = await deployment.found("patrol")

    assert check.state == "warning"
    assert "not answered in time" in check.message


async def test_nothing_is_written(deployment: Deployment) -> None:
    """A look leaves no trace, whatever it finds."""
    await deployment.apply(register("ada"), pack("cs_1", "cus_first"), grant("bob", 5))
    before = await written(deployment.owner)
    await deployment.look()
    assert await written(deployment.owner) == before


async def written(owner: asyncpg.Connection) -> list[tuple[str, int]]:
    """Every table's rows, by count and content."""
    tables = await owner.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'credits'")
    return [
        (row[0], await owner.fetchval(f"SELECT sum(hashtextextended(t::text, 0)) FROM {row[0]} t"))
        for row in tables
    ]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("PARKED", (10,)),
        ("REJECTIONS", (10,)),
        ("INTEGRITY", (10, 10, 10)),
        ("LATE", (30.0, 10)),
        ("OUTBOX_DEPTH", (10,)),
        ("OUTBOX_OLDEST", ()),
        ("DEAD_LETTERS", (["malformed"], 10)),
    ],
)
async def test_each_question_finds_its_rows_by_an_index(
    deployment: Deployment, name: str, arguments: tuple[Any, ...]
) -> None:
    """Sessions read no table in sequence where there is another way: a plan that does would grow with the ledger."""
    plan = await deployment.pool.fetch(f"EXPLAIN {getattr(module, name)}", *arguments)
    text = "\n".join(row[0] for row in plan)
    assert "Index" in text
    assert "Seq Scan" not in text, text


# -- Kafka -------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(kafka_bootstrap: str, topic_prefix: str) -> Settings:
    """Topics of this test's own."""
    return load_settings(kafka_bootstrap=kafka_bootstrap, topic_prefix=topic_prefix, partitions=2)


async def test_lag_is_what_workers_have_not_finished(settings: Settings) -> None:
    """All of a topic where its group never committed, else what came after; nothing is consumed by asking."""
    await ensure_topics(settings)
    topic = settings.topic("booking.events")
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap)
    await producer.start()
    for number in range(5):
        await producer.send_and_wait(topic, b"x", partition=number % 2)
    await producer.stop()
    expected = {name: 5 if name == "booking.events" else 0 for name in INBOUND_TOPICS}
    assert await lags(settings, seconds_max=30) == expected

    group = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap,
        group_id=group_of(settings, "booking.events"),
        enable_auto_commit=False,
    )
    group.assign([TopicPartition(topic, 0)])
    await group.start()
    await group.commit({TopicPartition(topic, 0): 3})
    await group.stop()

    assert await lags(settings, seconds_max=30) == expected | {"booking.events": 2}


async def test_a_topic_that_is_not_there_is_critical(
    deployment: Deployment, settings: Settings
) -> None:
    """Nobody can publish to it: the whole look says so."""
    health = await look(deployment.pool, settings)
    (lag,) = (check for check in health.checks if check.name == "lag")
    assert (lag.state, lag.found, health.healthy) == ("critical", 4, False)
    assert "stripe.webhook does not exist" in lag.findings[0].message


def test_a_long_lag_is_a_warning() -> None:
    """By topic; a burst is none."""
    check = judge_lag({"booking.events": 10_001, "generation.events": 10_000})
    assert (check.state, [finding.subject for finding in check.findings]) == (
        "warning",
        ["booking.events"],
    )


async def test_kafka_that_is_away_is_told(deployment: Deployment) -> None:
    """It is a problem of its own, told in time, and the rest is answered."""
    away = load_settings(kafka_bootstrap="127.0.0.1:9")
    health = await look(deployment.pool, away)
    checks = {check.name: check.state for check in health.checks}
    assert checks == {**dict.fromkeys(NAMES, "ok"), "lag": "warning"}
    assert health.verdict == "WARNING: lag."


async def test_kafka_that_does_not_answer_is_given_up(settings: Settings) -> None:
    """The person on call is not kept waiting."""

    async def silence(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await done.wait()
        writer.close()

    done = asyncio.Event()
    server = await asyncio.start_server(silence, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    silent = load_settings(kafka_bootstrap=f"{host}:{port}")
    async with asyncio.timeout(5):
        with pytest.raises(Unanswered):
            await lags(silent, seconds_max=0.5)
    done.set()
    server.close()
