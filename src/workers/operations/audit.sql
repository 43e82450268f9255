-- What must be true of the books. Each block is a name, what it counts as checked, the sentence that a person is told,
-- and a query that is empty when the sentence is true; `audit.py` reads them. A row of it is a finding:
-- account, subject, the subject's id, field, what is stored, what should be.
--
-- Conventions. The time is now(), that of what the audit sees: its clock may be minutes later when a question is asked.
-- $1 is the accounts to judge, NULL for all. Lots move between accounts only when those are merged, so
-- $1 names with an account also those that were merged into it. What a superuser may have torn (a constraint, a
-- foreign key) is not relied upon. An allocation that cannot be read makes its query fail, which counts as a finding;
-- the entry itself is named by `hashes_are_contents`.

-- name: family
-- Accounts, and those that were merged into them.
WITH RECURSIVE family (account_id, steps) AS (
    SELECT id COLLATE "C", 0 FROM unnest($1::text[]) AS id
    UNION ALL
    SELECT a.account_id::text COLLATE "C", f.steps + 1
    FROM family f JOIN accounts a ON a.merged_into = f.account_id WHERE f.steps < 32
)
SELECT DISTINCT account_id FROM family;

-- name: heirs
-- A part of the queries that say {heirs}: of each merged account the last of its heirs.
heirs (account_id, heir, steps) AS (
    SELECT account_id::text COLLATE "C", merged_into::text COLLATE "C", 1 FROM accounts WHERE merged_into IS NOT NULL
    UNION ALL
    SELECT h.account_id, a.merged_into::text COLLATE "C", h.steps + 1
    FROM heirs h JOIN accounts a ON a.account_id = h.heir WHERE a.merged_into IS NOT NULL AND h.steps < 32
), last_heirs AS (
    SELECT DISTINCT ON (account_id) account_id, heir FROM heirs ORDER BY account_id, steps DESC
);

-- name: counts
-- How many there are of each thing that the invariants judge.
SELECT (SELECT count(*) FROM accounts WHERE $1::text[] IS NULL OR account_id = ANY($1)) AS accounts,
       (SELECT count(*) FROM entries WHERE $1::text[] IS NULL OR account_id = ANY($1)) AS entries,
       (SELECT count(*) FROM lots WHERE $1::text[] IS NULL OR account_id = ANY($1)) AS lots,
       (SELECT count(*) FROM generations WHERE $1::text[] IS NULL OR account_id = ANY($1)) AS generations,
       (SELECT count(*) FROM generations WHERE state = 'held' AND ($1::text[] IS NULL OR account_id = ANY($1))) AS holds,
       (SELECT count(*) FROM bookings WHERE $1::text[] IS NULL OR client_account = ANY($1)) AS bookings,
       (SELECT count(*) FROM purchases WHERE $1::text[] IS NULL OR account_id = ANY($1)) AS purchases,
       (SELECT count(*) FROM allocations WHERE $1::text[] IS NULL OR account_id = ANY($1)) AS allocations,
       (SELECT count(*) FROM commands WHERE $1::text[] IS NULL OR account_id = ANY($1)) AS commands,
       (SELECT count(*) FROM usage_days WHERE $1::text[] IS NULL OR account_id = ANY($1)) AS days,
       (SELECT count(*) FROM outbox WHERE $1::text[] IS NULL OR aggregateid = ANY($1)) AS outbox,
       (SELECT count(*) FROM dead_letters WHERE $1::text[] IS NULL) AS letters,
       (SELECT count(*) FROM parked WHERE $1::text[] IS NULL) AS parked,
       (SELECT count(*) FROM identities WHERE $1::text[] IS NULL OR owner = ANY($1)) AS identities,
       (SELECT count(*) FROM subscriptions WHERE $1::text[] IS NULL OR account_id = ANY($1)) AS subscriptions,
       (SELECT count(DISTINCT transaction_id) FROM entries
        WHERE (kind IN ('transfer', 'merge') OR kind IN ('booking_debit', 'booking_reversal') AND cause ? 'booking_id')
          AND ($1::text[] IS NULL OR account_id = ANY($1))) AS transactions;

-- -- Accounts -----------------------------------------------------------------------------------------------------

-- name: accounts_exist
-- checks: entries, generations, bookings, purchases, commands, days
-- Whatever names an account names one that exists.
SELECT n.account_id, 'account', n.account_id, n.named_by, count(*)::text || ' rows name it', 'an account'
FROM (
    SELECT account_id, 'entries' AS named_by FROM entries
    UNION ALL SELECT account_id, 'lots' FROM lots
    UNION ALL SELECT account_id, 'generations' FROM generations
    UNION ALL SELECT client_account, 'bookings' FROM bookings
    UNION ALL SELECT practitioner_account, 'bookings' FROM bookings
    UNION ALL SELECT account_id, 'purchases' FROM purchases
    UNION ALL SELECT account_id, 'commands' FROM commands
    UNION ALL SELECT account_id, 'usage_days' FROM usage_days
    UNION ALL SELECT account_id, 'subscriptions' FROM subscriptions
    UNION ALL SELECT owner, 'identities' FROM identities
) n
WHERE NOT EXISTS (SELECT FROM accounts a WHERE a.account_id = n.account_id)
  AND n.account_id IS NOT NULL AND ($1::text[] IS NULL OR n.account_id = ANY($1))
GROUP BY n.account_id, n.named_by;

-- name: heirs_exist
-- checks: accounts
-- A merged account names an heir that exists, and following heirs ends within 32 steps.
WITH RECURSIVE heirs (account_id, heir, steps) AS (
    SELECT account_id::text COLLATE "C", merged_into::text COLLATE "C", 1
    FROM accounts
    WHERE merged_into IS NOT NULL AND ($1::text[] IS NULL OR account_id = ANY($1))
    UNION ALL
    SELECT h.account_id, a.merged_into::text COLLATE "C", h.steps + 1
    FROM heirs h JOIN accounts a ON a.account_id = h.heir
    WHERE a.merged_into IS NOT NULL AND h.steps <= 32
)
SELECT h.account_id, 'account', h.account_id, 'merged_into', h.heir,
       CASE WHEN h.steps > 32 THEN 'no circle' ELSE 'an account that exists' END
FROM heirs h
WHERE h.steps = 33 OR h.steps = 1 AND NOT EXISTS (SELECT FROM accounts a WHERE a.account_id = h.heir);

-- name: merged_accounts_own_nothing
-- checks: accounts
-- A merged account has no credits, no debt, no open lot, no hold, no months to come, no purchase and no subscription.
SELECT a.account_id, 'account', a.account_id, t.field, t.stored::text, '0'
FROM accounts a
LEFT JOIN (SELECT account_id, count(*) AS n FROM lots WHERE remaining > 0 GROUP BY account_id) l
       ON l.account_id = a.account_id
LEFT JOIN (SELECT account_id, count(*) AS n FROM generations WHERE state = 'held' GROUP BY account_id) g
       ON g.account_id = a.account_id
LEFT JOIN (SELECT account_id, count(*) AS n FROM allocations WHERE next_at IS NOT NULL GROUP BY account_id) m
       ON m.account_id = a.account_id
LEFT JOIN (SELECT account_id, count(*) AS n FROM purchases GROUP BY account_id) p ON p.account_id = a.account_id
LEFT JOIN (SELECT account_id, count(*) AS n FROM subscriptions GROUP BY account_id) s ON s.account_id = a.account_id
CROSS JOIN LATERAL (VALUES ('subscription', a.subscription), ('purchased', a.purchased), ('held', a.held),
                           ('debt', a.debt), ('open lots', l.n), ('open holds', g.n), ('running allocations', m.n),
                           ('purchases', p.n), ('subscriptions', s.n)) AS t (field, stored)
WHERE a.state = 'merged' AND t.stored <> 0 AND ($1::text[] IS NULL OR a.account_id = ANY($1));

-- name: totals_are_lots
-- checks: accounts
-- An account's subscription, purchased and held credits are the sums of its lots.
SELECT a.account_id, 'account', a.account_id, t.field, t.stored::text, t.expected::text
FROM accounts a
LEFT JOIN (
    SELECT account_id, sum(remaining) FILTER (WHERE pool = 'subscription') AS subscription,
           sum(remaining) FILTER (WHERE pool = 'purchased') AS purchased, sum(held) AS held
    FROM lots GROUP BY account_id
) l ON l.account_id = a.account_id
CROSS JOIN LATERAL (VALUES ('subscription', a.subscription, coalesce(l.subscription, 0)),
                           ('purchased', a.purchased, coalesce(l.purchased, 0)),
                           ('held', a.held, coalesce(l.held, 0))) AS t (field, stored, expected)
WHERE t.stored <> t.expected AND ($1::text[] IS NULL OR a.account_id = ANY($1));

-- name: totals_are_journal
-- checks: accounts
-- An account's totals, debt, version, hash and time are those of its last entry.
WITH newest AS (
    SELECT account_id, max(version) AS version FROM entries
    WHERE $1::text[] IS NULL OR account_id = ANY($1) GROUP BY account_id
)
SELECT a.account_id, 'account', a.account_id, t.field, t.stored, t.expected
FROM accounts a
LEFT JOIN newest n ON n.account_id = a.account_id
LEFT JOIN entries e ON e.account_id = n.account_id AND e.version = n.version
CROSS JOIN LATERAL (VALUES
    ('version', a.version::text, coalesce(e.version, 0)::text),
    ('subscription', a.subscription::text, coalesce(e.subscription_after, 0)::text),
    ('purchased', a.purchased::text, coalesce(e.purchased_after, 0)::text),
    ('held', a.held::text, coalesce(e.held_after, 0)::text),
    ('debt', a.debt::text, coalesce(e.debt_after, 0)::text),
    ('chain_hash', encode(a.chain_hash, 'hex'), coalesce(encode(e.hash, 'hex'), '')),
    ('updated_at', a.updated_at::text, greatest(a.updated_at, e.recorded_at)::text)
) AS t (field, stored, expected)
WHERE (a.version, a.subscription, a.purchased, a.held, a.debt, a.chain_hash, a.updated_at) IS DISTINCT FROM
      (coalesce(e.version, 0), coalesce(e.subscription_after, 0), coalesce(e.purchased_after, 0),
       coalesce(e.held_after, 0), coalesce(e.debt_after, 0), coalesce(e.hash, ''::bytea),
       greatest(a.updated_at, e.recorded_at))
  AND t.stored IS DISTINCT FROM t.expected AND ($1::text[] IS NULL OR a.account_id = ANY($1));

-- name: debt_takes_unheld_credits
-- checks: accounts
-- An account owes only while nothing of its balance is unheld.
SELECT account_id, 'account', account_id, 'debt', debt || ' beside ' || subscription + purchased - held || ' unheld',
       'no debt, or nothing unheld'
FROM accounts
WHERE debt <> 0 AND held <> subscription + purchased AND ($1::text[] IS NULL OR account_id = ANY($1));

-- name: held_is_owned
-- checks: accounts, lots, entries
-- Nothing holds more than it has.
SELECT account_id, 'account', account_id, 'held', held::text, 'at most ' || subscription + purchased
FROM accounts WHERE held > subscription + purchased AND ($1::text[] IS NULL OR account_id = ANY($1))
UNION ALL
SELECT account_id, 'lot', lot_id::text, 'held', held::text, 'at most ' || remaining
FROM lots WHERE held > remaining AND ($1::text[] IS NULL OR account_id = ANY($1))
UNION ALL
SELECT account_id, 'version', version::text, 'held_after', held_after::text, 'at most ' || balance_after
FROM entries WHERE held_after > balance_after AND ($1::text[] IS NULL OR account_id = ANY($1));

-- name: nothing_is_negative
-- checks: accounts, lots, entries, generations, bookings, purchases, days
-- No total, amount or counter is below zero.
SELECT account_id, 'account', account_id, t.field, t.stored::text, 'at least 0'
FROM accounts CROSS JOIN LATERAL (VALUES ('subscription', subscription), ('purchased', purchased), ('held', held),
                                         ('debt', debt), ('version', version)) AS t (field, stored)
WHERE least(subscription, purchased, held, debt, version) < 0 AND t.stored < 0
  AND ($1::text[] IS NULL OR account_id = ANY($1))
UNION ALL
SELECT account_id, 'lot', lot_id::text, t.field, t.stored::text, 'at least 0'
FROM lots CROSS JOIN LATERAL (VALUES ('granted', granted), ('remaining', remaining), ('held', held),
                                     ('expired', expired), ('clawed', clawed)) AS t (field, stored)
WHERE least(granted, remaining, held, expired, clawed) < 0 AND t.stored < 0
  AND ($1::text[] IS NULL OR account_id = ANY($1))
UNION ALL
SELECT account_id, 'version', version::text, t.field, t.stored::text, 'at least 0'
FROM entries CROSS JOIN LATERAL (VALUES ('balance_before', balance_before), ('balance_after', balance_after),
                                        ('subscription_after', subscription_after),
                                        ('purchased_after', purchased_after), ('held_after', held_after),
                                        ('debt_after', debt_after)) AS t (field, stored)
WHERE least(balance_before, balance_after, subscription_after, purchased_after, held_after, debt_after) < 0
  AND t.stored < 0 AND ($1::text[] IS NULL OR account_id = ANY($1))
UNION ALL
SELECT account_id, 'generation', generation_id, t.field, t.stored::text, 'at least 0'
FROM generations CROSS JOIN LATERAL (VALUES ('held', held), ('taken', taken), ('given_back', given_back))
                            AS t (field, stored)
WHERE least(held, taken, given_back) < 0 AND t.stored < 0 AND ($1::text[] IS NULL OR account_id = ANY($1))
UNION ALL
SELECT client_account, 'booking', booking_id, t.field, t.stored::text, 'at least 0'
FROM bookings CROSS JOIN LATERAL (VALUES ('credits', credits), ('given_back', given_back)) AS t (field, stored)
WHERE t.stored < 0 AND ($1::text[] IS NULL OR client_account = ANY($1))
UNION ALL
SELECT account_id, 'purchase', purchase_key, t.field, t.stored::text, 'at least 0'
FROM purchases CROSS JOIN LATERAL (VALUES ('credits', credits), ('paid', paid)) AS t (field, stored)
WHERE t.stored < 0 AND ($1::text[] IS NULL OR account_id = ANY($1))
UNION ALL
SELECT account_id, 'day', day::text, t.field, t.stored::text, 'at least 0'
FROM usage_days CROSS JOIN LATERAL (VALUES ('generations', generations), ('held', held), ('captured', captured))
                           AS t (field, stored)
WHERE t.stored < 0 AND ($1::text[] IS NULL OR account_id = ANY($1));

-- -- The journal --------------------------------------------------------------------------------------------------

-- name: versions_have_no_gaps
-- checks: entries
-- The versions of an account's entries count from 1 without a gap.
SELECT account_id, 'version', version::text, 'version', version::text, expected::text
FROM (
    SELECT account_id, version, coalesce(lag(version) OVER (PARTITION BY account_id ORDER BY version), 0) + 1 AS expected
    FROM entries WHERE $1::text[] IS NULL OR account_id = ANY($1)
) e
WHERE version <> expected;

-- name: entries_continue
-- checks: entries
-- Each entry begins with the balance, pools, held credits and debt with which its predecessor ended.
SELECT e.account_id, 'version', e.version::text, t.field, t.stored::text, t.expected::text
FROM (
    SELECT account_id, version, balance_before, coalesce(lag(balance_after) OVER before, 0) AS balance,
           subscription_after, coalesce(lag(subscription_after) OVER before, 0) + subscription_delta AS subscription,
           purchased_after, coalesce(lag(purchased_after) OVER before, 0) + purchased_delta AS purchased,
           held_after, coalesce(lag(held_after) OVER before, 0) + held_delta AS held,
           debt_after, coalesce(lag(debt_after) OVER before, 0) + debt_delta AS debt
    FROM entries WHERE $1::text[] IS NULL OR account_id = ANY($1)
    WINDOW before AS (PARTITION BY account_id ORDER BY version)
) e
CROSS JOIN LATERAL (VALUES ('balance_before', e.balance_before, e.balance),
                           ('subscription_after', e.subscription_after, e.subscription),
                           ('purchased_after', e.purchased_after, e.purchased),
                           ('held_after', e.held_after, e.held),
                           ('debt_after', e.debt_after, e.debt)) AS t (field, stored, expected)
WHERE (e.balance_before, e.subscription_after, e.purchased_after, e.held_after, e.debt_after) IS DISTINCT FROM
      (e.balance, e.subscription, e.purchased, e.held, e.debt) AND t.stored <> t.expected;

-- name: entries_add_up
-- checks: entries
-- An entry's balance after is the balance before plus the changes of both pools, and the sum of both pools after.
SELECT account_id, 'version', version::text, 'balance_after', t.stored::text, t.expected::text
FROM entries
CROSS JOIN LATERAL (VALUES (balance_after, balance_before + subscription_delta + purchased_delta),
                           (balance_after, subscription_after + purchased_after)) AS t (stored, expected)
WHERE t.stored <> t.expected AND ($1::text[] IS NULL OR account_id = ANY($1));

-- name: entries_are_allocations
-- checks: entries
-- An entry's changes of pools and held credits are the sums of what it did to lots.
SELECT e.account_id, 'version', e.version::text, t.field, t.stored::text, t.expected::text
FROM entries e
CROSS JOIN LATERAL (
    SELECT coalesce(sum(amount) FILTER (WHERE pool = 'subscription'), 0) AS subscription,
           coalesce(sum(amount) FILTER (WHERE pool = 'purchased'), 0) AS purchased, coalesce(sum(held), 0) AS held
    FROM jsonb_to_recordset(e.allocation) AS move (pool text, amount bigint, held bigint)
) m
CROSS JOIN LATERAL (VALUES ('subscription_delta', e.subscription_delta, m.subscription),
                           ('purchased_delta', e.purchased_delta, m.purchased),
                           ('held_delta', e.held_delta, m.held)) AS t (field, stored, expected)
WHERE (e.subscription_delta, e.purchased_delta, e.held_delta) IS DISTINCT FROM (m.subscription, m.purchased, m.held)
  AND t.stored <> t.expected AND ($1::text[] IS NULL OR e.account_id = ANY($1));

-- name: time_never_goes_back
-- checks: entries
-- No entry is recorded before its predecessor.
SELECT account_id, 'version', version::text, 'recorded_at', recorded_at::text, 'not before ' || before::text
FROM (
    SELECT account_id, version, recorded_at, lag(recorded_at) OVER (PARTITION BY account_id ORDER BY version) AS before
    FROM entries WHERE $1::text[] IS NULL OR account_id = ANY($1)
) e
WHERE recorded_at < before;

-- name: kinds_are_known
-- checks: entries
-- Every entry is of a kind that the ledger knows.
SELECT account_id, 'version', version::text, 'kind', kind, 'one of the closed set'
FROM entries WHERE kind <> ALL($2::text[]) AND ($1::text[] IS NULL OR account_id = ANY($1));

-- name: the_chain_holds
-- checks: entries
-- Each entry hangs on the hash of its predecessor, the first one on nothing.
SELECT account_id, 'version', version::text, 'previous_hash', encode(previous_hash, 'hex'), encode(expected, 'hex')
FROM (
    SELECT account_id, version, previous_hash,
           coalesce(lag(hash) OVER (PARTITION BY account_id ORDER BY version), ''::bytea) AS expected
    FROM entries WHERE $1::text[] IS NULL OR account_id = ANY($1)
) e
WHERE previous_hash <> expected;

-- -- Lots and holds -----------------------------------------------------------------------------------------------

-- name: allocations_name_lots
-- checks: entries
-- Every lot that an entry names exists, and is of the pool that the entry says.
SELECT e.account_id, 'version', e.version::text, 'allocation', format('lot %s, pool %s', m.lot_id, m.pool),
       coalesce('pool ' || l.pool, 'a lot that exists')
FROM entries e
CROSS JOIN LATERAL jsonb_to_recordset(e.allocation) AS m (lot_id uuid, pool text)
LEFT JOIN lots l ON l.lot_id = m.lot_id
WHERE l.pool IS DISTINCT FROM m.pool AND ($1::text[] IS NULL OR e.account_id = ANY($1));

-- name: lots_are_journal
-- checks: lots
-- What remains of a lot, what of it is held, what expired and what was clawed back is what entries did to it.
WITH moved AS (
    SELECT m.lot_id, sum(m.amount) AS remaining, sum(m.held) AS held,
           -sum(m.amount) FILTER (WHERE e.kind = 'expiry') AS expired,
           -sum(m.amount) FILTER (WHERE e.kind IN ('clawback', 'clawback_reversal')) AS clawed
    FROM entries e CROSS JOIN LATERAL jsonb_to_recordset(e.allocation) AS m (lot_id uuid, amount bigint, held bigint)
    WHERE $1::text[] IS NULL OR e.account_id = ANY($1)
    GROUP BY m.lot_id
)
SELECT l.account_id, 'lot', l.lot_id::text, t.field, t.stored::text, t.expected::text
FROM lots l
LEFT JOIN moved m ON m.lot_id = l.lot_id
CROSS JOIN LATERAL (VALUES ('remaining', l.remaining, coalesce(m.remaining, 0)),
                           ('held', l.held, coalesce(m.held, 0)),
                           ('expired', l.expired, coalesce(m.expired, 0)),
                           -- What a reversal granted anew was clawed back of another lot.
                           ('clawed', l.clawed, coalesce(m.clawed, 0)
                                      + CASE l.source_kind WHEN 'clawback_reversal' THEN l.granted ELSE 0 END))
                   AS t (field, stored, expected)
WHERE t.stored <> t.expected AND ($1::text[] IS NULL OR l.account_id = ANY($1));

-- name: lots_were_granted
-- checks: lots
-- Every lot was made by the entry that it names, of its kind and with its credits, or came with a merge, or came back
-- after one.
SELECT l.account_id, 'lot', l.lot_id::text, 'granted_version',
       format('%s: %s credits by %s', l.granted_version, l.granted, l.source_kind), 'an entry that did this'
FROM lots l
LEFT JOIN (
    SELECT e.version, e.kind, m.lot_id, m.amount
    FROM entries e CROSS JOIN LATERAL jsonb_to_recordset(e.allocation) AS m (lot_id uuid, amount bigint)
    WHERE e.balance_after > e.balance_before AND m.amount > 0 AND ($1::text[] IS NULL OR e.account_id = ANY($1))
) m ON m.lot_id = l.lot_id AND m.version = l.granted_version
       AND (m.kind IN ('merge', 'clawback_reversal') OR m.kind = l.source_kind AND m.amount = l.granted)
WHERE m.lot_id IS NULL AND ($1::text[] IS NULL OR l.account_id = ANY($1));

-- name: lots_are_within_their_grant
-- checks: lots
-- What remains, expired and was clawed back of a lot is not more than was granted.
SELECT account_id, 'lot', lot_id::text, 'granted', granted::text,
       format('at least %s remaining + %s expired + %s clawed', remaining, expired, clawed)
FROM lots WHERE remaining + expired + clawed > granted AND ($1::text[] IS NULL OR account_id = ANY($1));

-- name: lots_are_open_until_used_up
-- checks: lots
-- A lot is marked open exactly while something of it remains.
SELECT account_id, 'lot', lot_id::text, 'open', open::text, (remaining > 0)::text
FROM lots WHERE open <> (remaining > 0) AND ($1::text[] IS NULL OR account_id = ANY($1));

-- name: held_is_pinned
-- checks: lots
-- What is held of a lot is what open holds pinned to it.
WITH pinned AS (
    SELECT (pin ->> 0)::uuid AS lot_id, sum((pin ->> 1)::bigint) AS credits
    FROM generations CROSS JOIN LATERAL jsonb_array_elements(hold_allocation) AS pin
    WHERE state = 'held' GROUP BY 1
)
SELECT l.account_id, 'lot', l.lot_id::text, 'held', l.held::text, coalesce(p.credits, 0)::text
FROM lots l LEFT JOIN pinned p ON p.lot_id = l.lot_id
WHERE l.held <> coalesce(p.credits, 0) AND ($1::text[] IS NULL OR l.account_id = ANY($1));

-- name: holds_are_pins
-- checks: holds
-- An open hold is the sum of its pins, and they are in lots of its account; an ended one pins nothing.
WITH pins AS (
    SELECT g.generation_id, g.account_id, g.held, (pin ->> 0)::uuid AS lot_id, (pin ->> 1)::bigint AS credits
    FROM generations g LEFT JOIN LATERAL jsonb_array_elements(g.hold_allocation) AS pin ON true
    WHERE (g.state = 'held' OR g.held <> 0 OR g.hold_allocation <> '[]')
      AND ($1::text[] IS NULL OR g.account_id = ANY($1))
)
SELECT account_id, 'generation', generation_id::text, 'held', held::text, coalesce(sum(credits), 0)::text
FROM pins GROUP BY account_id, generation_id, held HAVING held <> coalesce(sum(credits), 0)
UNION ALL
SELECT p.account_id, 'generation', p.generation_id, 'hold_allocation', 'lot ' || p.lot_id, 'a lot of its account'
FROM pins p LEFT JOIN lots l ON l.lot_id = p.lot_id
WHERE p.lot_id IS NOT NULL AND l.account_id IS DISTINCT FROM p.account_id;

-- -- What credits were given and taken for ------------------------------------------------------------------------

-- name: generations_are_journal
-- checks: generations
-- What a generation holds, took and gave back is what its entries moved, and no more came back than was taken.
-- What an organisation paid comes back to whom its credits are then: of some accounts alone that cannot be judged.
WITH moved AS (
    SELECT e.cause ->> 'generation_id' AS generation_id, min(e.account_id) AS account_id, sum(held_delta) AS held,
           -sum(subscription_delta + purchased_delta) FILTER (WHERE e.kind <> 'generation_refund') AS taken,
           sum(subscription_delta + purchased_delta) FILTER (WHERE e.kind = 'generation_refund') AS given_back
    FROM entries e LEFT JOIN generations p ON p.generation_id = e.cause ->> 'generation_id'
    WHERE e.kind IN ('generation_hold', 'generation_capture', 'generation_release', 'generation_debit',
                     'generation_refund')
      AND e.cause ? 'generation_id'
      AND ($1::text[] IS NULL OR e.account_id = ANY($1)
           AND NOT (e.kind = 'generation_refund' AND p.account_id IS NOT NULL AND p.account_id LIKE 'org:%'))
    GROUP BY 1
)
SELECT coalesce(g.account_id, m.account_id), 'generation', coalesce(g.generation_id, m.generation_id), t.field,
       t.stored::text, t.expected::text
FROM (SELECT * FROM generations WHERE $1::text[] IS NULL OR account_id = ANY($1)) g
FULL JOIN moved m ON m.generation_id = g.generation_id
CROSS JOIN LATERAL (VALUES ('held', coalesce(g.held, 0), coalesce(m.held, 0)),
                           ('taken', coalesce(g.taken, 0), coalesce(m.taken, 0)),
                           ('given_back', coalesce(g.given_back, 0),
                            CASE WHEN $1::text[] IS NOT NULL AND g.account_id LIKE 'org:%' THEN g.given_back
                                 ELSE coalesce(m.given_back, 0) END),
                           ('given_back', g.given_back, least(g.given_back, g.taken))) AS t (field, stored, expected)
WHERE t.stored <> t.expected;

-- name: bookings_are_journal
-- checks: bookings
-- A booking's price and what came back of it is what its client's entries moved, no more came back than was paid, and
-- what it earned is a lot.
WITH moved AS (
    SELECT cause ->> 'booking_id' AS booking_id, min(account_id) AS account_id,
           -sum(subscription_delta + purchased_delta) FILTER (WHERE kind = 'booking_debit') AS credits,
           sum(subscription_delta + purchased_delta) FILTER (WHERE kind = 'booking_reversal') AS given_back
    FROM entries
    WHERE (kind = 'booking_debit' OR kind = 'booking_reversal' AND subscription_delta + purchased_delta > 0)
      AND cause ? 'booking_id' AND ($1::text[] IS NULL OR account_id = ANY($1))
    GROUP BY 1
)
SELECT coalesce(b.client_account, m.account_id), 'booking', coalesce(b.booking_id, m.booking_id), t.field,
       t.stored::text, t.expected::text
FROM (SELECT * FROM bookings WHERE $1::text[] IS NULL OR client_account = ANY($1)) b
FULL JOIN moved m ON m.booking_id = b.booking_id
CROSS JOIN LATERAL (VALUES ('credits', coalesce(b.credits, 0), coalesce(m.credits, 0)),
                           ('given_back', coalesce(b.given_back, 0), coalesce(m.given_back, 0)),
                           ('given_back', b.given_back, least(b.given_back, b.credits))) AS t (field, stored, expected)
WHERE t.stored <> t.expected
UNION ALL
SELECT b.client_account, 'booking', b.booking_id, 'earning_lot', coalesce('lot ' || b.earning_lot, 'none'),
       'the lot of booking:' || b.booking_id
FROM bookings b LEFT JOIN lots l ON l.lot_id = b.earning_lot AND l.source_reference = 'booking:' || b.booking_id
WHERE b.credits > 0 AND l.lot_id IS NULL AND ($1::text[] IS NULL OR b.client_account = ANY($1));

-- name: credits_are_conserved
-- checks: transactions
-- What a transfer, a booking or a merge moves between accounts is neither more nor less after it, debt counted.
SELECT min(account_id), 'transaction', transaction_id::text, 'sum of ' || string_agg(account_id, ', ' ORDER BY account_id),
       sum(subscription_delta + purchased_delta - debt_delta)::text, '0'
FROM entries
WHERE (kind IN ('transfer', 'merge')
       OR kind IN ('booking_debit', 'booking_reversal', 'session_earning') AND cause ? 'booking_id')
  AND ($1::text[] IS NULL
       OR transaction_id IN (SELECT transaction_id FROM entries WHERE account_id = ANY($1)))
GROUP BY transaction_id HAVING sum(subscription_delta + purchased_delta - debt_delta) <> 0;

-- name: purchases_have_lots
-- checks: purchases
-- A purchase's lot exists, is of its account and kind, has its credits, and is no other purchase's.
WITH RECURSIVE {heirs}, bought AS (
    SELECT p.*, count(*) OVER (PARTITION BY p.lot_id) AS sharing FROM purchases p WHERE p.lot_id IS NOT NULL
)
SELECT p.account_id, 'purchase', p.purchase_key, t.field, t.stored, t.expected
FROM bought p
LEFT JOIN lots l ON l.lot_id = p.lot_id
LEFT JOIN last_heirs hp ON hp.account_id = p.account_id
LEFT JOIN last_heirs hl ON hl.account_id = l.account_id
CROSS JOIN LATERAL (VALUES
    ('lot_id', p.lot_id::text, CASE WHEN l.lot_id IS NULL THEN 'a lot that exists' END),
    ('lot_id', format('lot %s, of %s purchases', p.lot_id, p.sharing),
     CASE WHEN p.sharing > 1 THEN 'a lot of its own' END),
    ('account_id', p.account_id::text,
     CASE WHEN coalesce(hp.heir, p.account_id) <> coalesce(hl.heir, l.account_id) THEN 'that of its lot, ' || l.account_id END),
    ('kind', p.kind, CASE WHEN p.kind <> l.source_kind THEN 'that of its lot, ' || l.source_kind END),
    ('credits', p.credits::text, CASE WHEN p.credits > l.granted THEN 'at most those of its lot, ' || l.granted END)
) AS t (field, stored, expected)
WHERE t.expected IS NOT NULL AND ($1::text[] IS NULL OR p.account_id = ANY($1));

-- name: bought_lots_have_purchases
-- checks: lots
-- A lot that a business key granted is what that key is remembered for, so that it cannot be granted again.
SELECT l.account_id, 'lot', l.lot_id::text, 'source_reference', l.source_reference, 'a purchase of this lot by this key'
FROM lots l LEFT JOIN purchases p ON p.purchase_key = l.source_reference AND p.lot_id = l.lot_id
WHERE l.source_kind IN ('signup_grant', 'purchase', 'subscription_grant', 'session_earning')
  AND l.source_reference ~ '^(signup|checkout|period|change|allocation):'
  AND p.purchase_key IS NULL AND ($1::text[] IS NULL OR l.account_id = ANY($1));

-- name: signups_are_marked
-- checks: purchases
-- Who was given the sign-up grant, or inherited from somebody who was, is marked so, and is not given another.
WITH RECURSIVE {heirs}
SELECT p.account_id, 'account', a.account_id, 'signup_granted', a.signup_granted::text, 'true, for ' || p.purchase_key
FROM purchases p
LEFT JOIN last_heirs h ON h.account_id = p.account_id
JOIN accounts a ON a.account_id = coalesce(h.heir, p.account_id)
WHERE p.purchase_key LIKE 'signup:%' AND NOT a.signup_granted AND ($1::text[] IS NULL OR p.account_id = ANY($1));

-- name: clawed_is_its_parts
-- checks: purchases
-- What was clawed back of a purchase is the sum of where it was taken, and not more than was bought.
SELECT p.account_id, 'purchase', p.purchase_key, 'clawed', p.clawed::text, t.expected
FROM purchases p
CROSS JOIN LATERAL (
    SELECT coalesce(sum((part ->> 1)::bigint), 0) AS credits FROM jsonb_array_elements(p.clawed_parts) AS part
) parts
CROSS JOIN LATERAL (VALUES (CASE WHEN p.clawed <> parts.credits THEN parts.credits::text END),
                           (CASE WHEN p.clawed > p.credits THEN 'at most ' || p.credits END)) AS t (expected)
WHERE t.expected IS NOT NULL AND ($1::text[] IS NULL OR p.account_id = ANY($1));

-- name: clawed_follows_the_money
-- checks: purchases
-- What was clawed back of a purchase is its share of the money that went back for it.
WITH named AS (
    -- A payment intent and its charge are two names of one thing.
    SELECT payment_id, invoice_id, charge_id, refunded, coalesce(charge_id, payment_id) AS charge FROM payments
), refund AS (
    SELECT DISTINCT ON (n.charge, r.refund_id) n.charge, r.amount, r.status
    FROM refunds r JOIN named n USING (payment_id)
    ORDER BY n.charge, r.refund_id, array_position(ARRAY['failed', 'succeeded', 'pending'], r.status), r.amount DESC
), refunded AS (
    SELECT charge, coalesce(sum(amount) FILTER (WHERE status <> 'failed'), 0) AS amount FROM refund GROUP BY charge
), dispute AS (
    SELECT n.charge, d.dispute_id, max(d.amount) AS amount, array_agg(DISTINCT step) AS steps
    FROM disputes d JOIN named n USING (payment_id) LEFT JOIN LATERAL unnest(d.steps) step ON true
    GROUP BY n.charge, d.dispute_id
), disputed AS (
    SELECT charge, sum(amount) AS amount FROM dispute
    WHERE 'lost' = ANY(steps) OR 'withdrawn' = ANY(steps) AND NOT steps && ARRAY['reinstated', 'won']
    GROUP BY charge
), returned AS (
    SELECT n.charge, coalesce(max(r.amount), max(n.refunded)) + coalesce(max(d.amount), 0) AS amount
    FROM named n LEFT JOIN refunded r USING (charge) LEFT JOIN disputed d USING (charge) GROUP BY n.charge
), paying AS (
    SELECT b.purchase_key, n.charge FROM purchases b JOIN named n ON n.invoice_id = b.invoice_id
    UNION SELECT b.purchase_key, n.charge FROM purchases b JOIN named n ON n.payment_id = b.payment_id
    UNION SELECT b.purchase_key, n.charge FROM purchases b JOIN named n ON n.charge_id = b.payment_id
), gone AS (
    SELECT purchase_key, sum(amount) AS amount FROM paying JOIN returned USING (charge) GROUP BY purchase_key
)
SELECT b.account_id, 'purchase', b.purchase_key, 'clawed', b.clawed::text,
       format('%s: %s of %s paid went back', t.target, coalesce(g.amount, 0), b.paid)
FROM purchases b
LEFT JOIN gone g ON g.purchase_key = b.purchase_key
CROSS JOIN LATERAL (
    SELECT CASE WHEN b.paid > 0 AND b.lot_id IS NOT NULL
                THEN div(b.credits::numeric * least(coalesce(g.amount, 0), b.paid), b.paid) ELSE 0 END AS target
) t
WHERE b.clawed <> t.target AND ($1::text[] IS NULL OR b.account_id = ANY($1));

-- name: months_were_granted
-- checks: allocations
-- The next month of a yearly period follows the last one that it granted; its first follows the invoice's own.
SELECT a.account_id, 'allocation', a.allocation_key, 'next_month', a.next_month::text, (1 + max(p.month))::text
FROM allocations a
LEFT JOIN purchases p ON p.purchase_key = a.allocation_key || ':' || p.month
      AND p.subscription_id = a.subscription_id AND p.month > 0
WHERE $1::text[] IS NULL OR a.account_id = ANY($1)
GROUP BY a.allocation_key
HAVING a.next_month <> 1 + max(p.month) OR count(p.month) > a.next_month - 1;

-- name: months_to_come_are_planned
-- checks: accounts
-- An account is due for the next month of a yearly period when the first of its periods says so.
SELECT a.account_id, 'account', a.account_id, 'allocate_at', a.allocate_at::text, m.next_at::text
FROM accounts a
LEFT JOIN (SELECT account_id, min(next_at) AS next_at FROM allocations GROUP BY account_id) m
       ON m.account_id = a.account_id
WHERE a.allocate_at IS DISTINCT FROM m.next_at AND ($1::text[] IS NULL OR a.account_id = ANY($1));

-- name: days_are_counted
-- checks: days
-- A day's counter is the number of generations counted on that day; a merge adds both accounts' up.
WITH RECURSIVE {heirs}, stored AS (
    SELECT coalesce(h.heir, u.account_id::text) AS account_id, u.day, sum(u.generations) AS generations
    FROM usage_days u LEFT JOIN last_heirs h ON h.account_id = u.account_id
    WHERE u.member_id = '' AND ($1::text[] IS NULL OR u.account_id = ANY($1)) GROUP BY 1, 2
), counted AS (
    SELECT coalesce(h.heir, g.account_id::text) AS account_id, g.counted_on AS day, count(*) AS generations
    FROM generations g LEFT JOIN last_heirs h ON h.account_id = g.account_id
    WHERE g.counted_on IS NOT NULL AND g.member_id IS NULL AND ($1::text[] IS NULL OR g.account_id = ANY($1))
    GROUP BY 1, 2
)
SELECT account_id, 'day', day::text, 'generations', coalesce(s.generations, 0)::text, coalesce(c.generations, 0)::text
FROM stored s FULL JOIN counted c USING (account_id, day)
WHERE coalesce(s.generations, 0) <> coalesce(c.generations, 0);

-- name: members_are_counted
-- checks: days
-- What a member has held and captured of an organisation's credits on a day is what the generations requested on it say;
-- a merge adds both members' up.
WITH RECURSIVE {heirs}, stored AS (
    SELECT u.account_id, coalesce(h.heir, 'user:' || u.member_id) AS member, u.day, sum(u.held) AS held,
           sum(u.captured) AS captured
    FROM usage_days u LEFT JOIN last_heirs h ON h.account_id = 'user:' || u.member_id
    WHERE u.member_id <> '' AND ($1::text[] IS NULL OR u.account_id = ANY($1)) GROUP BY 1, 2, 3
), said AS (
    SELECT g.account_id, coalesce(h.heir, 'user:' || g.member_id) AS member, g.counted_on AS day, sum(g.held) AS held,
           sum(g.taken) AS captured
    FROM generations g LEFT JOIN last_heirs h ON h.account_id = 'user:' || g.member_id
    WHERE g.member_id IS NOT NULL AND g.counted_on IS NOT NULL AND ($1::text[] IS NULL OR g.account_id = ANY($1))
    GROUP BY 1, 2, 3
)
SELECT account_id, 'day', day::text, t.field || ' of ' || member, t.stored::text, t.expected::text
FROM stored s FULL JOIN said g USING (account_id, member, day)
CROSS JOIN LATERAL (VALUES ('held', coalesce(s.held, 0), coalesce(g.held, 0)),
                           ('captured', coalesce(s.captured, 0), coalesce(g.captured, 0))) AS t (field, stored, expected)
WHERE t.stored <> t.expected;

-- name: organisations_are_sane
-- checks: accounts
-- An organisation has an account; a mirror has one member and no unheld credits of its own; members are open to be asked:
-- none was merged into somebody else; what a hold releases goes to an account that exists and was not merged.
SELECT 'org:' || o.organization_id, 'organisation', o.organization_id::text, t.field, t.stored, t.expected
FROM organisations o
LEFT JOIN accounts a ON a.account_id = 'org:' || o.organization_id
CROSS JOIN LATERAL (SELECT count(*) AS n FROM members m WHERE m.organization_id = o.organization_id) m
CROSS JOIN LATERAL (VALUES
    ('account', NULL, CASE WHEN a.account_id IS NULL THEN 'an account' END),
    ('members', m.n::text, CASE WHEN o.mode = 'mirror' AND m.n <> 1 THEN 'one, as a mirror has' END),
    ('available', (a.subscription + a.purchased - a.held)::text,
     CASE WHEN o.mode = 'mirror' AND a.subscription + a.purchased <> a.held THEN '0, as a mirror has' END)
) AS t (field, stored, expected)
WHERE t.expected IS NOT NULL AND ($1::text[] IS NULL OR 'org:' || o.organization_id = ANY($1))
UNION ALL
SELECT 'org:' || m.organization_id, 'member', m.user_id::text, 'account', coalesce('merged into ' || a.merged_into, 'none'),
       'an account that was not merged'
FROM members m LEFT JOIN accounts a ON a.account_id = 'user:' || m.user_id
WHERE (a.account_id IS NULL OR a.state = 'merged') AND ($1::text[] IS NULL OR 'org:' || m.organization_id = ANY($1))
UNION ALL
SELECT g.account_id, 'generation', g.generation_id, 'released_to', g.released_to, 'another account that was not merged'
FROM generations g LEFT JOIN accounts a ON a.account_id = g.released_to
WHERE g.released_to IS NOT NULL AND (a.account_id IS NULL OR a.state = 'merged' OR g.released_to = g.account_id)
  AND ($1::text[] IS NULL OR g.account_id = ANY($1));

-- -- Who it is, and what is due -----------------------------------------------------------------------------------

-- name: customers_are_mapped
-- checks: subscriptions
-- The Stripe customer of a subscription is mapped to an account, so that its next invoice finds whose it is. Where two
-- people share one (an old system let them) nobody can say whose it is: the metadata of each event decides (R13).
SELECT s.account_id, 'subscription', s.subscription_id, 'customer ' || s.customer_id, NULL, s.account_id
FROM subscriptions s
WHERE s.customer_id IS NOT NULL AND s.account_id IS NOT NULL
  AND NOT EXISTS (SELECT FROM identities i WHERE i.external_id = s.customer_id AND i.provider = 'stripe')
  AND NOT EXISTS (SELECT FROM subscriptions o WHERE o.customer_id = s.customer_id AND o.account_id <> s.account_id)
  AND ($1::text[] IS NULL OR s.account_id = ANY($1));

-- name: identities_are_one
-- checks: identities
-- One id means one person, whatever provider says it and however an address is spelled, and that person was not merged away.
WITH RECURSIVE {heirs}, meant AS (
    SELECT i.external_id, i.provider, i.owner, coalesce(h.heir, i.owner::text) AS heir,
           CASE WHEN i.external_id LIKE '%@%' THEN lower(i.external_id) ELSE i.external_id END AS name
    FROM identities i LEFT JOIN last_heirs h ON h.account_id = i.owner
)
SELECT m.owner, 'identity', m.provider || ' ' || m.external_id, 'owner', m.owner::text, m.heir
FROM meant m WHERE m.heir <> m.owner AND ($1::text[] IS NULL OR m.owner = ANY($1))
UNION ALL
SELECT m.heir, 'identity', m.provider || ' ' || m.external_id, 'person', m.heir,
       'that of ' || o.provider || ' ' || o.external_id || ', ' || o.heir
FROM meant m JOIN meant o ON o.name = m.name AND o.heir <> m.heir
WHERE $1::text[] IS NULL OR m.heir = ANY($1);

-- name: subscriptions_name_their_account
-- checks: subscriptions
-- What Stripe said of a subscription is kept with the account that it was resolved to.
SELECT s.account_id, 'subscription', s.subscription_id, 'resolved_supabase_user_id',
       s.metadata ->> 'resolved_supabase_user_id', substr(s.account_id, strpos(s.account_id, ':') + 1)
FROM subscriptions s
WHERE s.event_rank >= 0 AND s.account_id IS NOT NULL
  AND s.metadata ->> 'resolved_supabase_user_id' IS DISTINCT FROM substr(s.account_id, strpos(s.account_id, ':') + 1)
  AND ($1::text[] IS NULL OR s.account_id = ANY($1));

-- name: paid_periods_were_granted
-- checks: subscriptions
-- An account without credits whose subscription is active has been given something in the period that runs, three hours
-- after Stripe told of it at the latest.
SELECT s.account_id, 'subscription', s.subscription_id, 'granted since ' || to_char(s.period_start, 'YYYY-MM-DD"T"HH24:MI:SS"Z"'),
       NULL, 'the credits of ' || s.plan
FROM subscriptions s JOIN accounts a ON a.account_id = s.account_id
WHERE s.status = 'active' AND s.plan IS NOT NULL AND a.state = 'open'
  AND a.subscription = 0 AND a.purchased = 0 AND a.debt = 0
  AND s.period_start <= now() - interval '3 hours' AND s.period_end > now()
  AND s.recorded_at <= now() - interval '3 hours'
  AND NOT EXISTS (SELECT FROM entries e WHERE e.account_id = s.account_id AND e.balance_after > e.balance_before
                  AND e.recorded_at >= s.period_start)
  AND NOT EXISTS (SELECT FROM purchases p WHERE p.account_id = s.account_id AND p.period_end >= s.period_end)
  AND ($1::text[] IS NULL OR s.account_id = ANY($1));

-- name: nothing_is_overdue
-- checks: holds, lots
-- What time ends has ended half a minute later: holds past their deadline, lots past their expiry.
SELECT account_id, 'generation', generation_id, 'deadline_at', deadline_at::text, 'released then'
FROM generations
WHERE state = 'held' AND deadline_at < now() - interval '30 seconds' AND account_id IS NOT NULL
  AND ($1::text[] IS NULL OR account_id = ANY($1))
UNION ALL
SELECT account_id, 'lot', lot_id::text, 'expires_at', expires_at::text, 'its ' || remaining - held || ' unheld credits expired then'
FROM lots
WHERE open AND expires_at < now() - interval '30 seconds' AND remaining > held
  AND ($1::text[] IS NULL OR account_id = ANY($1));

-- name: parked_messages_are_tried
-- checks: parked
-- A message that waits is tried again within ten minutes, and does not wait beyond its deadline.
SELECT o.owner, 'parked message', p.parked_id::text, t.field, t.stored, t.expected
FROM parked p
LEFT JOIN LATERAL (SELECT i.owner FROM identities i WHERE i.external_id = p.waits_for ORDER BY i.provider = p.provider DESC,
                   i.provider LIMIT 1) o ON true
CROSS JOIN LATERAL (VALUES
    ('next_attempt_at', p.next_attempt_at::text,
     CASE WHEN p.next_attempt_at > now() + interval '10 minutes' THEN 'within ten minutes' END),
    ('deadline_at', p.deadline_at::text,
     CASE WHEN p.deadline_at < now() - interval '1 hour' THEN 'no deadline long past' END)
) AS t (field, stored, expected)
WHERE t.expected IS NOT NULL AND ($1::text[] IS NULL OR o.owner = ANY($1));

-- -- Why it happened, and what is told ----------------------------------------------------------------------------

-- name: entries_have_commands
-- checks: entries
-- Every entry that time did not write was written by a command that was applied, under that command's key.
SELECT e.account_id, 'version', e.version::text, 'transaction_id',
       format('%s, for %s %s of %s', e.transaction_id, e.cause ->> 'type', e.cause ->> 'idempotency_key', e.cause ->> 'source'),
       CASE WHEN c.key IS NULL THEN 'an applied command'
            ELSE format('that of the command, %s %s %s of %s', c.outcome, c.type, c.key, c.scope) END
FROM entries e LEFT JOIN commands c ON c.transaction_id = e.transaction_id
WHERE e.cause ->> 'source' IS DISTINCT FROM 'clock'
  AND (c.outcome, c.scope, c.type, c.key) IS DISTINCT FROM
      ('applied', e.cause ->> 'source', e.cause ->> 'type', e.cause ->> 'idempotency_key')
  AND ($1::text[] IS NULL OR e.account_id = ANY($1));

-- name: applied_commands_have_entries
-- checks: commands
-- Every applied command whose kind always moves credits has entries.
SELECT c.account_id, 'command', c.key, c.type, 'applied, without an entry', 'an entry of transaction ' || c.transaction_id
FROM commands c
WHERE c.outcome = 'applied'
  AND c.type IN ('credits.granted', 'credits.adjusted', 'credits.transferred', 'booking.requested', 'booking.cancelled',
                 'generation.requested', 'generation.completed', 'generation.failed', 'generation.cancelled',
                 'generation.refunded')
  AND NOT EXISTS (SELECT FROM entries e WHERE e.transaction_id = c.transaction_id)
  AND ($1::text[] IS NULL OR c.account_id = ANY($1));

-- name: outbox_tells_the_journal
-- checks: outbox
-- What waits to be published is about accounts that exist, and every change of credits in it is in the journal.
SELECT o.aggregateid, 'outbox', o.sequence::text, 'id', o.type || ' ' || o.id, 'an entry of this id'
FROM outbox o
WHERE o.type = 'credit.changed' AND ($1::text[] IS NULL OR o.aggregateid = ANY($1))
  AND NOT EXISTS (SELECT FROM entries e WHERE e.account_id = o.aggregateid AND e.entry_id = o.id)
UNION ALL
SELECT t.account_id, 'outbox', t.sequence::text, 'payload', t.type || ' about ' || t.account_id, 'an account that exists'
FROM (
    SELECT sequence, type, convert_from(payload, 'UTF8')::json ->> 'account_id' AS account_id FROM outbox
    WHERE type IN ('credit.rejected', 'credit.alert') AND ($1::text[] IS NULL OR aggregateid = ANY($1))
) t
WHERE t.account_id IS NOT NULL AND NOT EXISTS (SELECT FROM accounts a WHERE a.account_id = t.account_id);

-- name: replays_are_parked
-- checks: letters
-- A dead letter is being replayed exactly while its copy is parked.
SELECT NULL, 'dead letter', d.dead_letter_id::text, 'state', d.state,
       CASE WHEN p.parked_id IS NULL THEN 'not replaying: no copy is parked' ELSE 'replaying: a copy is parked' END
FROM dead_letters d LEFT JOIN parked p ON p.dead_letter_id = d.dead_letter_id
WHERE (d.state = 'replaying') <> (p.parked_id IS NOT NULL) AND $1::text[] IS NULL;

-- name: hashes_are_contents
-- checks: entries
-- The hash of every entry is that of its content: nothing of it was changed after it was written.
SELECT account_id, version, entry_id, transaction_id, kind, subscription_delta, purchased_delta, held_delta, debt_delta,
       balance_before, balance_after, subscription_after, purchased_after, held_after, debt_after, allocation,
       member_id, cause, topic, partition, kafka_offset AS offset, trace_id, catalogue_version,
       CASE WHEN occurred_at BETWEEN '0001-01-01 UTC' AND '9999-12-31 23:59:59.999999 UTC' THEN occurred_at END AS occurred_at,
       CASE WHEN recorded_at BETWEEN '0001-01-01 UTC' AND '9999-12-31 23:59:59.999999 UTC' THEN recorded_at END AS recorded_at,
       previous_hash, hash
FROM entries WHERE $1::text[] IS NULL OR account_id = ANY($1);
