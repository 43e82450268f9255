"""One audit query for each invariant of the books; on whole books every one of them finds nothing.

They look at stored rows alone, and at what a test says that it has sent (`remember`). `journal.py` says much of it
again in Python, and makes the hash chain anew: of two audits written apart, one will see what the other overlooks.
"""

import hashlib
from collections.abc import Iterable

import asyncpg

from workers.ledger.catalogue import Catalogue
from workers.ledger.commands import Command
from workers.sources import Identities, Sources, Understood
from workers.store.set_aside import Work

from .journal import rebuilt
from .kit import CATALOGUE, RECORD_BYTES_MAX, SECRET

MOVES = "jsonb_to_recordset(e.allocation) AS m (lot_id uuid, pool text, amount bigint, held bigint)"
PINS = """
SELECT g.generation_id, g.account_id, (pin ->> 0)::uuid AS lot_id, (pin ->> 1)::bigint AS credits
FROM generations g, jsonb_array_elements(g.hold_allocation) pin
"""
# The entry that a lot came from: the first that names it. (A merge moves it; the versions of one account count up.)
GRANTED = f"""
SELECT m.lot_id, e.kind, m.amount AS credits, e.transaction_id, count(*) OVER (PARTITION BY m.lot_id) AS entries
FROM entries e, {MOVES} JOIN lots l USING (lot_id) WHERE e.kind = l.source_kind AND m.amount = l.granted
"""
# Whom a merged account belongs to.
HEIRS = """
WITH RECURSIVE heirs AS (
    SELECT account_id, account_id AS heir FROM accounts WHERE merged_into IS NULL
    UNION ALL SELECT a.account_id, h.heir FROM accounts a JOIN heirs h ON a.merged_into = h.account_id
)
"""
# What a statement of a test may put beside the database's own tables: the records that it has sent.
SENT = """
CREATE TEMP TABLE IF NOT EXISTS sent (scope text, type text, key text, fingerprint bytea, topic text, kafka_offset bigint);
TRUNCATE sent;
"""

# The invariant in a sentence → what breaks it.
INVARIANTS = {
    "totals are the sum of the lots": """
        SELECT a.account_id, a.subscription, a.purchased, a.held, l.* FROM accounts a
        LEFT JOIN (SELECT account_id, sum(remaining) FILTER (WHERE pool = 'subscription') AS subscription,
                          sum(remaining) FILTER (WHERE pool = 'purchased') AS purchased, sum(held) AS held
                   FROM lots GROUP BY account_id) l USING (account_id)
        WHERE (a.subscription, a.purchased, a.held)
              <> (coalesce(l.subscription, 0), coalesce(l.purchased, 0), coalesce(l.held, 0))""",
    "totals are the sum of the entries": """
        SELECT a.account_id, a.subscription, a.purchased, a.held, a.debt, e.* FROM accounts a
        LEFT JOIN (SELECT account_id, sum(subscription_delta) AS subscription, sum(purchased_delta) AS purchased,
                          sum(held_delta) AS held, sum(debt_delta) AS debt
                   FROM entries GROUP BY account_id) e USING (account_id)
        WHERE (a.subscription, a.purchased, a.held, a.debt)
              <> (coalesce(e.subscription, 0), coalesce(e.purchased, 0), coalesce(e.held, 0), coalesce(e.debt, 0))""",
    "an account stands where its last entry left it": """
        SELECT a.account_id, a.version, e.version FROM accounts a
        LEFT JOIN (SELECT DISTINCT ON (account_id) * FROM entries ORDER BY account_id, version DESC) e USING (account_id)
        WHERE (a.version, a.chain_hash, a.subscription, a.purchased, a.held, a.debt)
              <> (coalesce(e.version, 0), coalesce(e.hash, ''), coalesce(e.subscription_after, 0),
                  coalesce(e.purchased_after, 0), coalesce(e.held_after, 0), coalesce(e.debt_after, 0))""",
    "versions count up from one": """
        SELECT * FROM (SELECT account_id, version, row_number() OVER (PARTITION BY account_id ORDER BY version) AS number
                       FROM entries) numbered
        WHERE version <> number""",
    "an entry begins where the one before it ended": """
        SELECT e.account_id, e.version FROM (
            SELECT *, lag(balance_after, 1, 0::bigint) OVER journal AS balance,
                   lag(subscription_after, 1, 0::bigint) OVER journal AS subscription,
                   lag(purchased_after, 1, 0::bigint) OVER journal AS purchased,
                   lag(held_after, 1, 0::bigint) OVER journal AS held, lag(debt_after, 1, 0::bigint) OVER journal AS debt,
                   lag(hash, 1, ''::bytea) OVER journal AS link, lag(recorded_at) OVER journal AS recorded
            FROM (SELECT account_id, version, balance_before, balance_after::bigint, subscription_after::bigint,
                         purchased_after::bigint, held_after::bigint, debt_after::bigint, subscription_delta,
                         purchased_delta, held_delta, debt_delta, previous_hash, hash, recorded_at FROM entries) plain
            WINDOW journal AS (PARTITION BY account_id ORDER BY version)) e
        WHERE (balance_before, subscription_after, purchased_after, held_after, debt_after, previous_hash)
              <> (balance, subscription + subscription_delta, purchased + purchased_delta, held + held_delta,
                  debt + debt_delta, link)
           OR balance_after <> balance_before + subscription_delta + purchased_delta OR recorded_at < recorded""",
    "an entry is what it did to lots": f"""
        SELECT e.account_id, e.version FROM entries e, LATERAL (
            SELECT coalesce(sum(m.amount) FILTER (WHERE m.pool = 'subscription'), 0) AS subscription,
                   coalesce(sum(m.amount) FILTER (WHERE m.pool = 'purchased'), 0) AS purchased,
                   coalesce(sum(m.held), 0) AS held, count(*) - count(DISTINCT m.lot_id) AS repeats FROM {MOVES}) lots
        WHERE (e.subscription_delta, e.purchased_delta, e.held_delta) <> (subscription, purchased, held) OR repeats > 0""",
    # A merge takes a lot out of one account's journal and brings it into another's.
    "a lot is what entries did to it": f"""
        SELECT account_id, lot_id, l.remaining, l.held, m.remaining, m.held FROM lots l
        FULL JOIN (SELECT e.account_id, m.lot_id, m.pool, sum(m.amount) AS remaining, sum(m.held) AS held
                   FROM entries e, {MOVES} GROUP BY 1, 2, 3) m USING (account_id, lot_id, pool)
        WHERE (coalesce(l.remaining, 0), coalesce(l.held, 0)) <> (coalesce(m.remaining, 0), coalesce(m.held, 0))""",
    "a lot lost by expiry what entries say": f"""
        SELECT lot_id, l.expired, m.expired FROM lots l
        FULL JOIN (SELECT m.lot_id, -sum(m.amount) AS expired FROM entries e, {MOVES} WHERE e.kind = 'expiry' GROUP BY 1) m
        USING (lot_id) WHERE l.lot_id IS NULL OR l.expired <> coalesce(m.expired, 0)""",
    "a lot was granted by an entry": f"""
        SELECT l.lot_id FROM lots l LEFT JOIN ({GRANTED}) g USING (lot_id)
        WHERE (g.kind, g.credits) IS DISTINCT FROM (l.source_kind, l.granted) OR g.entries <> 1""",
    "nothing is negative": """
        SELECT account_id, version FROM accounts WHERE least(subscription, purchased, held, debt, version) < 0
        UNION ALL SELECT account_id, version FROM entries
        WHERE least(balance_before, balance_after, subscription_after, purchased_after, held_after, debt_after) < 0
        UNION ALL SELECT account_id, granted_version FROM lots
        WHERE least(granted, remaining, held, expired, clawed, remaining - held) < 0""",
    "no more is held than there is": """
        SELECT account_id, version FROM accounts WHERE held > subscription + purchased
        UNION ALL SELECT account_id, version FROM entries WHERE held_after > balance_after""",
    "bookings, transfers and merges neither make nor lose credits": """
        SELECT transaction_id, kind = 'merge', sum(subscription_delta + purchased_delta - debt_delta) FROM entries
        WHERE cause ->> 'type' IN ('booking.requested', 'booking.cancelled', 'credits.transferred') OR kind = 'merge'
        GROUP BY 1, 2 HAVING sum(subscription_delta + purchased_delta - debt_delta) <> 0
                          OR kind = 'merge' AND sum(held_delta) <> 0""",
    "a merged account has nothing and forwards to one that lives": f"""
        {HEIRS} SELECT a.account_id, a.state, h.heir FROM accounts a LEFT JOIN heirs h USING (account_id)
        WHERE h.heir IS NULL OR (a.state = 'merged') <> (a.merged_into IS NOT NULL)
           OR a.state = 'merged' AND (a.subscription + a.purchased + a.held + a.debt > 0 OR a.allocate_at IS NOT NULL)
        UNION ALL SELECT a.account_id, 'has more', NULL FROM accounts a WHERE a.state = 'merged' AND (
            EXISTS (SELECT FROM lots l WHERE l.account_id = a.account_id AND l.open)
            OR EXISTS (SELECT FROM generations g WHERE g.account_id = a.account_id AND g.state = 'held')
            OR EXISTS (SELECT FROM purchases p WHERE p.account_id = a.account_id)
            OR EXISTS (SELECT FROM allocations l WHERE l.account_id = a.account_id AND l.next_at IS NOT NULL)
            OR EXISTS (SELECT FROM subscriptions s WHERE s.account_id = a.account_id)
            OR EXISTS (SELECT FROM identities i WHERE i.owner = a.account_id))""",
    "an account knows when its next month begins": """
        SELECT a.account_id, a.allocate_at, l.next_at FROM accounts a
        LEFT JOIN (SELECT account_id, min(next_at) AS next_at FROM allocations GROUP BY 1) l USING (account_id)
        WHERE a.allocate_at IS DISTINCT FROM l.next_at""",
    "what accounts hold is what generations hold": """
        SELECT a.account_id, a.held, g.held FROM accounts a
        FULL JOIN (SELECT account_id, sum(held) AS held FROM generations WHERE held > 0 GROUP BY 1) g USING (account_id)
        WHERE a.held IS DISTINCT FROM coalesce(g.held, 0)""",
    "what lots hold is what generations pinned": f"""
        SELECT l.lot_id, p.lot_id, l.held, p.credits FROM lots l
        FULL JOIN (SELECT account_id, lot_id, sum(credits) AS credits FROM ({PINS}) pins GROUP BY 1, 2) p
        USING (account_id, lot_id) WHERE l.held IS DISTINCT FROM coalesce(p.credits, 0)""",
    "what a generation holds is what it pinned": f"""
        SELECT g.generation_id FROM generations g
        LEFT JOIN (SELECT generation_id, sum(credits) AS credits FROM ({PINS}) pins GROUP BY 1) p USING (generation_id)
        WHERE g.held <> coalesce(p.credits, 0)""",
    # Inside a transaction an inflow may stand before the payment that it makes.
    "debt never stood beside unheld credits at a commit": """
        SELECT account_id, version FROM (
            SELECT DISTINCT ON (account_id, xmin::text) account_id, version, debt_after, held_after, balance_after
            FROM entries ORDER BY account_id, xmin::text, version DESC) committed
        WHERE debt_after > 0 AND held_after < balance_after""",
    # Days that are over stay where they were counted.
    "a day's counters are the generations that they counted": f"""
        {HEIRS} SELECT heir, day, u.generations, g.generations
        FROM (SELECT heir, day, sum(generations) AS generations FROM usage_days JOIN heirs USING (account_id)
              WHERE member_id = '' GROUP BY 1, 2) u
        FULL JOIN (SELECT heir, counted_on AS day, count(*) AS generations FROM generations JOIN heirs USING (account_id)
                   WHERE counted_on IS NOT NULL AND member_id IS NULL GROUP BY 1, 2) g
        USING (heir, day) WHERE coalesce(u.generations, 0) <> coalesce(g.generations, 0)""",
    "what a member has in use is what generations say": f"""
        {HEIRS} SELECT u.account_id, heir, day, u.held, u.captured, g.held, g.captured
        FROM (SELECT u.account_id, heir, day, sum(held) AS held, sum(captured) AS captured
              FROM usage_days u JOIN heirs h ON h.account_id = 'user:' || u.member_id WHERE member_id <> ''
              GROUP BY 1, 2, 3) u
        FULL JOIN (SELECT g.account_id, heir, counted_on AS day, sum(held) AS held, sum(taken) AS captured
                   FROM generations g JOIN heirs h ON h.account_id = 'user:' || g.member_id
                   WHERE counted_on IS NOT NULL GROUP BY 1, 2, 3) g
        USING (account_id, heir, day)
        WHERE (coalesce(u.held, 0), coalesce(u.captured, 0)) <> (coalesce(g.held, 0), coalesce(g.captured, 0))""",
    "a mirror keeps nothing that its member could spend": """
        SELECT organization_id FROM organisations JOIN accounts ON account_id = 'org:' || organization_id
        WHERE mode = 'mirror' AND subscription + purchased > held""",
    "a mirror has one member": """
        SELECT organization_id FROM organisations o WHERE mode = 'mirror'
          AND (SELECT count(*) FROM members m WHERE m.organization_id = o.organization_id) <> 1""",
    "a generation took and gave back what entries say": """
        SELECT g.generation_id, e.generation_id FROM generations g
        FULL JOIN (SELECT cause ->> 'generation_id' AS generation_id, sum(held_delta) AS held,
                          coalesce(-sum(subscription_delta + purchased_delta)
                              FILTER (WHERE kind IN ('generation_capture', 'generation_debit')), 0) AS taken,
                          coalesce(sum(purchased_delta) FILTER (WHERE kind = 'generation_refund'), 0) AS given_back
                   FROM entries WHERE kind LIKE 'generation%' GROUP BY 1) e ON e.generation_id = g.generation_id
        WHERE (g.held, g.taken, g.given_back) IS DISTINCT FROM
              (coalesce(e.held, 0), coalesce(e.taken, 0), coalesce(e.given_back, 0))""",
    "a booking cost, earned and gave back what entries say": """
        SELECT b.booking_id, e.booking_id FROM bookings b
        FULL JOIN (SELECT cause ->> 'booking_id' AS booking_id,
                          coalesce(-sum(subscription_delta + purchased_delta) FILTER (WHERE kind = 'booking_debit'), 0)
                              AS cost,
                          coalesce(sum(purchased_delta) FILTER (WHERE kind = 'session_earning'), 0) AS earned,
                          coalesce(sum(purchased_delta) FILTER (WHERE kind = 'booking_reversal' AND purchased_delta > 0), 0)
                              AS given_back
                   FROM entries WHERE cause ? 'booking_id' GROUP BY 1) e ON e.booking_id = b.booking_id
        WHERE (b.credits, b.credits, b.given_back) IS DISTINCT FROM
              (coalesce(e.cost, 0), coalesce(e.earned, 0), coalesce(e.given_back, 0))""",
    "a purchase made its own lot, once": f"""
        {HEIRS} SELECT p.purchase_key, p.lot_id FROM purchases p LEFT JOIN lots l USING (lot_id)
        LEFT JOIN heirs h ON h.account_id = l.account_id LEFT JOIN ({GRANTED}) g USING (lot_id)
        WHERE (p.lot_id IS NULL) <> (p.credits = 0)
           OR p.lot_id IS NOT NULL AND (p.account_id, p.transaction_id, p.kind) IS DISTINCT FROM
                                       (h.heir, g.transaction_id, g.kind)
        UNION ALL SELECT max(purchase_key), lot_id FROM purchases WHERE lot_id IS NOT NULL
        GROUP BY lot_id HAVING count(*) > 1
        UNION ALL SELECT l.source_reference, l.lot_id FROM lots l LEFT JOIN purchases p USING (lot_id)
        WHERE l.source_kind IN ('purchase', 'subscription_grant', 'signup_grant') AND p.lot_id IS NULL""",
    # In whatever order refunds, disputes, purchases and the links between them were told.
    "what is clawed is the share of the money that went back": """
        SELECT p.purchase_key, p.credits, p.paid, p.clawed, p.clawed_parts, coalesce(sum(m.returned), 0) AS returned
        FROM purchases p
        LEFT JOIN payments named ON named.payment_id = p.payment_id
        LEFT JOIN (
            SELECT m.payment_id, m.invoice_id, m.charge_id,
                   coalesce((SELECT sum(amount) FILTER (WHERE status <> 'failed') FROM refunds r
                             WHERE r.payment_id = m.payment_id HAVING count(*) > 0),
                            CASE WHEN EXISTS (SELECT FROM refunds r WHERE r.payment_id = m.payment_id) THEN 0
                            ELSE m.refunded END)
                   + coalesce((SELECT sum(amount) FROM disputes d WHERE d.payment_id = m.payment_id
                               AND ('lost' = ANY(steps)
                                    OR 'withdrawn' = ANY(steps) AND NOT steps && '{won,reinstated}')), 0) AS returned
            FROM payments m) m
        ON m.invoice_id = p.invoice_id OR p.payment_id IN (m.payment_id, m.charge_id) OR named.charge_id = m.payment_id
        WHERE p.lot_id IS NOT NULL AND p.paid > 0
        GROUP BY p.purchase_key
        HAVING p.clawed <> p.credits * least(coalesce(sum(m.returned), 0), p.paid)::bigint / p.paid""",
    "what is clawed is the sum of its parts": """
        SELECT p.purchase_key, p.clawed, p.clawed_parts FROM purchases p
        WHERE p.clawed <> (SELECT coalesce(sum((part ->> 1)::bigint), 0) FROM jsonb_array_elements(p.clawed_parts) part)""",
    "an entry is an applied command's or time's": """
        SELECT e.account_id, e.version, e.kind, c.outcome FROM entries e LEFT JOIN commands c USING (transaction_id)
        WHERE CASE e.cause ->> 'source' WHEN 'clock' THEN c.key IS NOT NULL
              ELSE (c.scope, c.type, c.key) IS DISTINCT FROM
                   (e.cause ->> 'source', e.cause ->> 'type', e.cause ->> 'idempotency_key')
                   OR c.outcome <> 'applied' END""",
    "every row has its account": """
        SELECT e.account_id FROM entries e LEFT JOIN accounts a USING (account_id) WHERE a.account_id IS NULL
        UNION SELECT l.account_id FROM lots l LEFT JOIN accounts a USING (account_id) WHERE a.account_id IS NULL
        UNION SELECT p.account_id FROM purchases p LEFT JOIN accounts a USING (account_id) WHERE a.account_id IS NULL
        UNION SELECT g.account_id FROM generations g LEFT JOIN accounts a USING (account_id)
        WHERE g.account_id IS NOT NULL AND a.account_id IS NULL
        UNION SELECT named FROM bookings b, unnest(ARRAY[b.client_account, b.practitioner_account]) AS named
        LEFT JOIN accounts a ON a.account_id = named WHERE named IS NOT NULL AND a.account_id IS NULL""",
    "each entry is published once": """
        SELECT e.entry_id, o.id FROM entries e
        FULL JOIN (SELECT id, aggregateid, convert_from(payload, 'UTF8')::jsonb AS data FROM outbox
                   WHERE type = 'credit.changed') o ON o.id = e.entry_id
        WHERE (o.aggregateid, (o.data ->> 'version')::bigint, (o.data -> 'balance' ->> 'after')::bigint)
              IS DISTINCT FROM (e.account_id, e.version, e.balance_after)
        UNION ALL SELECT id, id FROM outbox GROUP BY id HAVING count(*) > 1""",
    "each refusal is published once": """
        SELECT c.key, o.id FROM (SELECT * FROM commands WHERE outcome = 'rejected') c
        FULL JOIN (SELECT id, convert_from(payload, 'UTF8')::jsonb AS data FROM outbox
                   WHERE type = 'credit.rejected') o ON o.id = c.transaction_id
        WHERE (o.data ->> 'reason', o.data -> 'cause' ->> 'idempotency_key') IS DISTINCT FROM (c.reason, c.key)""",
    "each dead letter is published once": """
        SELECT d.dead_letter_id, count(o.id) FROM dead_letters d LEFT JOIN outbox o USING (dead_letter_id)
        GROUP BY 1 HAVING count(o.id) <> 1""",
    "versions are published in their order": """
        SELECT * FROM (
            SELECT aggregateid, version, lag(version, 1, 0::bigint) OVER (PARTITION BY aggregateid ORDER BY sequence) AS before
            FROM (SELECT aggregateid, sequence, (convert_from(payload, 'UTF8')::jsonb ->> 'version')::bigint AS version
                  FROM outbox WHERE type = 'credit.changed') published) ordered
        WHERE version <> before + 1""",
    "every command that was sent is decided once or waits, and no other": """
        SELECT 'lost' AS what, s.key FROM sent s
        WHERE NOT EXISTS (SELECT FROM commands c WHERE (c.scope, c.type, c.key) = (s.scope, s.type, s.key))
          AND NOT EXISTS (SELECT FROM parked p WHERE (p.topic, p.kafka_offset) = (s.topic, s.kafka_offset))
        UNION ALL SELECT 'never sent', c.key FROM commands c
        WHERE NOT EXISTS (SELECT FROM sent s WHERE (c.scope, c.type, c.key) = (s.scope, s.type, s.key))
        UNION ALL SELECT 'waits though it is decided', c.key FROM parked p
        JOIN commands c ON (c.scope, c.type, c.key) = (p.source, p.type, p.command_key)""",
    "what is dead has the key of other content, and the other way round": """
        SELECT s.key, topic, kafka_offset, d.reason, d.detail
        FROM (SELECT key, topic, kafka_offset FROM sent JOIN commands c USING (scope, type, key)
              WHERE sent.fingerprint <> c.fingerprint) s
        FULL JOIN dead_letters d USING (topic, kafka_offset)
        WHERE s.key IS NULL OR d.reason IS DISTINCT FROM 'idempotency_conflict'""",
    "what time has done is done": """
        SELECT account_id FROM generations WHERE state = 'held' AND deadline_at <= clock_timestamp()
        UNION SELECT account_id FROM lots WHERE expires_at <= clock_timestamp() AND remaining > held
        UNION SELECT account_id FROM allocations WHERE next_at <= clock_timestamp()""",
}


async def remember(
    owner: asyncpg.Connection, works: Iterable[Work], catalogue: Catalogue = CATALOGUE
) -> None:
    """Tell the audit which records were sent, instead of those told before. Each must be readable."""
    sources = Sources(catalogue, (SECRET,), RECORD_BYTES_MAX)
    rows = {(work.record.topic, work.record.offset): _sent(sources, work) for work in works}
    await owner.execute(SENT)
    await owner.copy_records_to_table("sent", schema_name="pg_temp", records=rows.values())


def _sent(sources: Sources, work: Work) -> tuple[str, str, str, bytes, str, int]:
    read = sources.read(work.record)
    assert isinstance(read, Understood), read
    built = read.build(Identities(()))
    # A record of Stripe's may wait for its owner; its content is its id (R8).
    content = isinstance(built, Command) and built.fingerprint
    fingerprint = content or hashlib.sha256(read.cause.id.encode()).digest()
    return (*read.cause.command_key, fingerprint, work.record.topic, work.record.offset)


async def broken_links(owner: asyncpg.Connection) -> list[str]:
    """The entries whose hash is not that of their content after their predecessor's."""
    found, account, link = [], None, b""
    for row in await owner.fetch("SELECT * FROM entries ORDER BY account_id, version"):
        before = link if row["account_id"] == account else b""
        account, link = row["account_id"], row["hash"]
        if row["previous_hash"] != before or rebuilt(row).link != link:
            found.append(f"{account} version {row['version']}")
    return found


async def broken(owner: asyncpg.Connection) -> dict[str, list[tuple[object, ...]]]:
    """The invariants that do not hold, and up to five rows that break each. `remember` must have been told."""
    found = {}
    for sentence, query in INVARIANTS.items():
        rows = await owner.fetch(f"SELECT * FROM ({query}) AS broken LIMIT 5")
        if rows:
            found[sentence] = [tuple(row) for row in rows]
    return found
