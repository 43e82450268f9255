-- How an account's rows are brought back to what the journal says. Each block is a name, a sentence and a statement; `repair.py`
-- runs them in this order, under the locks of the accounts, and only where nothing is wrong with the journal itself.
-- $1 is an account and those that were merged into it. No statement makes or loses a credit that the journal knows.

-- name: lots
-- What remains of each lot, what is held, expired and clawed, is what entries did to it.
WITH moved AS (
    SELECT m.lot_id, sum(m.amount) AS remaining, sum(m.held) AS held,
           coalesce(-sum(m.amount) FILTER (WHERE e.kind = 'expiry'), 0) AS expired,
           coalesce(-sum(m.amount) FILTER (WHERE e.kind IN ('clawback', 'clawback_reversal')), 0) AS clawed
    FROM entries e CROSS JOIN LATERAL jsonb_to_recordset(e.allocation) AS m (lot_id uuid, amount bigint, held bigint)
    WHERE e.account_id = ANY($1::text[]) GROUP BY m.lot_id
)
UPDATE lots l
SET remaining = m.remaining, held = m.held, expired = m.expired, open = m.remaining > 0,
    clawed = m.clawed + CASE l.source_kind WHEN 'clawback_reversal' THEN l.granted ELSE 0 END
FROM moved m
WHERE l.lot_id = m.lot_id AND l.account_id = ANY($1)
  AND (l.remaining, l.held, l.expired, l.open, l.clawed) IS DISTINCT FROM
      (m.remaining, m.held, m.expired, m.remaining > 0,
       m.clawed + CASE l.source_kind WHEN 'clawback_reversal' THEN l.granted ELSE 0 END);

-- name: accounts
-- Totals and debt are those of the last entry, where it is the one whose version and hash the account names.
UPDATE accounts a
SET subscription = coalesce(e.subscription_after, 0), purchased = coalesce(e.purchased_after, 0),
    held = coalesce(e.held_after, 0), debt = coalesce(e.debt_after, 0), updated_at = greatest(a.updated_at, e.recorded_at)
FROM unnest($1::text[]) AS n (account_id)
LEFT JOIN LATERAL (SELECT * FROM entries e WHERE e.account_id = n.account_id ORDER BY e.version DESC LIMIT 1) e ON true
WHERE a.account_id = n.account_id AND a.version = coalesce(e.version, 0) AND a.chain_hash = coalesce(e.hash, ''::bytea)
  AND (a.subscription, a.purchased, a.held, a.debt, a.updated_at) IS DISTINCT FROM
      (coalesce(e.subscription_after, 0), coalesce(e.purchased_after, 0), coalesce(e.held_after, 0),
       coalesce(e.debt_after, 0), greatest(a.updated_at, e.recorded_at));

-- name: holds
-- A hold that the journal does not know holds nothing. One that it knows, and that was forgotten, is open again and past its
-- deadline, so that it is released as every lapsed hold is.
WITH moved AS (
    SELECT e.cause ->> 'generation_id' AS generation_id, min(e.account_id) AS account_id, min(e.member_id) AS member_id,
           sum(e.held_delta) AS held,
           coalesce(-sum(e.subscription_delta + e.purchased_delta) FILTER (WHERE e.kind <> 'generation_refund'), 0) AS taken,
           coalesce(sum(e.subscription_delta + e.purchased_delta) FILTER (WHERE e.kind = 'generation_refund'), 0) AS given_back
    FROM entries e
    WHERE e.account_id = ANY($1::text[]) AND e.cause ? 'generation_id'
      AND e.kind IN ('generation_hold', 'generation_capture', 'generation_release', 'generation_debit', 'generation_refund')
    GROUP BY 1
), pinned AS (
    SELECT generation_id, jsonb_agg(jsonb_build_array(lot_id, credits) ORDER BY lot_id) AS pins
    FROM (SELECT e.cause ->> 'generation_id' AS generation_id, m.lot_id, sum(m.held) AS credits
          FROM entries e CROSS JOIN LATERAL jsonb_to_recordset(e.allocation) AS m (lot_id uuid, held bigint)
          WHERE e.account_id = ANY($1::text[]) AND e.cause ? 'generation_id' AND m.held <> 0
          GROUP BY 1, 2 HAVING sum(m.held) > 0) p GROUP BY 1
), said AS (
    SELECT m.*, coalesce(p.pins, '[]') AS pins FROM moved m LEFT JOIN pinned p USING (generation_id)
), forgotten AS (
    INSERT INTO generations (generation_id, account_id, member_id, state, held, hold_allocation, deadline_at, taken,
                             given_back, recorded_at)
    SELECT generation_id, account_id, member_id,
           CASE WHEN held > 0 THEN 'held' WHEN taken > 0 THEN 'completed' ELSE 'lapsed' END, held, pins,
           CASE WHEN held > 0 THEN clock_timestamp() END, taken, given_back, clock_timestamp()
    FROM said ON CONFLICT DO NOTHING
)
UPDATE generations g
SET state = t.state, held = t.held, hold_allocation = t.pins, taken = t.taken,
    deadline_at = CASE WHEN t.held > 0 THEN coalesce(g.deadline_at, clock_timestamp()) END,
    released_to = CASE WHEN t.held > 0 THEN g.released_to END,
    counted_on = CASE WHEN t.state IN ('held', 'completed') THEN g.counted_on END
FROM (
    SELECT o.generation_id, coalesce(s.held, 0) AS held, coalesce(s.taken, 0) AS taken, coalesce(s.pins, '[]') AS pins,
           CASE WHEN coalesce(s.held, 0) > 0 THEN 'held' WHEN o.state <> 'held' THEN o.state
                WHEN coalesce(s.taken, 0) > 0 THEN 'completed' ELSE 'lapsed' END AS state
    FROM generations o LEFT JOIN said s USING (generation_id) WHERE o.account_id = ANY($1)
) t
WHERE g.generation_id = t.generation_id
  AND (g.held <> t.held OR g.taken <> t.taken OR g.state <> t.state
       OR g.held > 0 AND NOT (g.hold_allocation @> t.pins AND t.pins @> g.hold_allocation));

-- name: signups
-- Who was given the sign-up grant is marked so.
UPDATE accounts a SET signup_granted = true
WHERE a.account_id = ANY($1::text[]) AND NOT a.signup_granted
  AND EXISTS (SELECT FROM purchases p WHERE p.account_id = a.account_id AND p.purchase_key LIKE 'signup:%');

-- name: months
-- The next month of a yearly period is waited for.
UPDATE accounts a SET allocate_at = m.next_at
FROM unnest($1::text[]) AS n (account_id)
CROSS JOIN LATERAL (SELECT min(next_at) AS next_at FROM allocations WHERE account_id = n.account_id) m
WHERE a.account_id = n.account_id AND a.allocate_at IS DISTINCT FROM m.next_at;

-- name: days
-- A day's counter is the number of generations counted on that day; of an account that nobody was merged into.
UPDATE usage_days u
SET generations = (SELECT count(*) FROM generations g
                   WHERE g.account_id = u.account_id AND g.counted_on = u.day AND g.member_id IS NULL)
WHERE u.account_id = ANY($1::text[]) AND cardinality($1) = 1 AND u.member_id = ''
  AND u.generations <> (SELECT count(*) FROM generations g
                        WHERE g.account_id = u.account_id AND g.counted_on = u.day AND g.member_id IS NULL);

-- name: metadata
-- What Stripe said of a subscription names the account that it was resolved to.
UPDATE subscriptions
SET metadata = metadata || jsonb_build_object('resolved_supabase_user_id', substr(account_id, strpos(account_id, ':') + 1))
WHERE account_id = ANY($1::text[]) AND event_rank >= 0
  AND metadata ->> 'resolved_supabase_user_id' IS DISTINCT FROM substr(account_id, strpos(account_id, ':') + 1);

-- name: identities
-- An id of somebody who was merged away means whom he became part of.
UPDATE identities i SET owner = n.heir
FROM (
    WITH RECURSIVE heirs (account_id, heir, steps) AS (
        SELECT account_id::text COLLATE "C", merged_into::text COLLATE "C", 1
        FROM accounts WHERE account_id = ANY($1::text[]) AND merged_into IS NOT NULL
        UNION ALL
        SELECT h.account_id, a.merged_into::text COLLATE "C", h.steps + 1
        FROM heirs h JOIN accounts a ON a.account_id = h.heir WHERE a.merged_into IS NOT NULL AND h.steps < 32
    )
    SELECT DISTINCT ON (account_id) account_id, heir FROM heirs ORDER BY account_id, steps DESC
) n
WHERE i.owner = n.account_id;

-- name: outbox
-- A change that never was is not told.
DELETE FROM outbox o
WHERE o.type = 'credit.changed' AND o.aggregateid = ANY($1::text[])
  AND NOT EXISTS (SELECT FROM entries e WHERE e.account_id = o.aggregateid AND e.entry_id = o.id);
