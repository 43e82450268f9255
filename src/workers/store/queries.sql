-- Every statement of a batch. Each block is a name, a sentence, and the SQL; `sql.py` reads them by name.
--
-- A session keeps its plans, and may have made them while the tables were empty, when to read a table whole costs nothing.
-- So each statement leaves one way to its rows: their key. Sessions read no table in sequence (`database.py`); what is left
-- is to read an index from end to end, for the sake of its order or of a condition that every row meets. Hence:
--   `key = ANY (ARRAY[n.key])` where a table is joined with what was given: unlike `=` it can be looked up and not sorted by;
--   `(state = 'x') IS TRUE` where a state has an index too, which is as good as the key while both are empty;
--   `OFFSET 0` after what is looked up for each key: no other condition finds its way in, to be looked up instead.

-- name: find_identities
-- What the mapping table says of these external ids.
SELECT external_id, provider, owner FROM identities WHERE external_id = ANY($1::text[]);

-- name: find_money
-- Ids of payments, charges and invoices that speak of the same money as these, however far they are linked; for the
-- subscriptions that are named the money of changes of plan, which may still wait for their period.
WITH RECURSIVE money (id) AS (
    SELECT unnest($1::text[])
    UNION
    SELECT changed.id FROM purchases p CROSS JOIN LATERAL unnest(ARRAY[p.payment_id, p.invoice_id]) changed (id)
    WHERE p.subscription_id = ANY($2::text[]) AND p.worth IS NOT NULL AND changed.id IS NOT NULL
    UNION
    SELECT linked.id FROM money CROSS JOIN LATERAL (
        SELECT unnest(ARRAY[p.payment_id, p.charge_id, p.invoice_id]) FROM payments p WHERE p.payment_id = money.id
        UNION ALL SELECT p.payment_id FROM payments p WHERE p.charge_id = money.id
        UNION ALL SELECT p.payment_id FROM payments p WHERE p.invoice_id = money.id
        UNION ALL SELECT p.invoice_id FROM purchases p WHERE p.payment_id = money.id
        UNION ALL SELECT p.payment_id FROM purchases p WHERE p.invoice_id = money.id
        OFFSET 0
    ) linked (id) WHERE linked.id IS NOT NULL
)
SELECT id FROM money;

-- name: create_payments
-- On first sight, in the order in which they will be locked.
INSERT INTO payments (payment_id, recorded_at) SELECT id, clock_timestamp() FROM unnest($1::text[]) AS id
ORDER BY id COLLATE "C" ON CONFLICT DO NOTHING;

-- name: lock_payments
-- Whoever speaks of the same money waits here; before accounts, always.
SELECT payment_id FROM payments WHERE payment_id = ANY($1::text[]) ORDER BY payment_id FOR UPDATE;

-- name: load_payments
-- Payments of the locked money, with what went back of each.
SELECT p.payment_id, p.invoice_id, p.charge_id, p.refunded, p.recorded_at,
       (SELECT jsonb_agg(jsonb_build_array(r.refund_id, r.amount, r.status) ORDER BY r.refund_id)
        FROM refunds r WHERE r.payment_id = p.payment_id) AS refunds,
       (SELECT jsonb_agg(jsonb_build_array(d.dispute_id, d.amount, d.steps) ORDER BY d.dispute_id)
        FROM disputes d WHERE d.payment_id = p.payment_id) AS disputes
FROM payments p WHERE p.payment_id = ANY($1::text[]);

-- name: find_parties
-- Every account that must be locked: those named, those of business objects and of organisations that a batch names, and
-- the heirs of merged ones. Whether there is any hold that releases to another account is asked beside: then, as where a
-- batch touches organisations, `find_linked_parties` finds the rest. Known accounts are there already: none is ever removed.
WITH RECURSIVE parties AS (
    SELECT unnest($1::text[]) AS account_id
    UNION SELECT named.account_id FROM generations g
          CROSS JOIN LATERAL unnest(ARRAY[g.account_id::text, 'user:' || g.member_id]) AS named (account_id)
          WHERE g.generation_id = ANY($2::text[])
    UNION SELECT client_account FROM bookings WHERE booking_id = ANY($3::text[])
    UNION SELECT practitioner_account FROM bookings WHERE booking_id = ANY($3::text[])
    UNION SELECT account_id FROM purchases WHERE payment_id = ANY($4::text[])
    UNION SELECT account_id FROM purchases WHERE invoice_id = ANY($4::text[])
    UNION SELECT account_id FROM allocations WHERE payment_id = ANY($4::text[])
    UNION SELECT account_id FROM allocations WHERE invoice_id = ANY($4::text[])
    UNION SELECT account_id FROM subscriptions WHERE subscription_id = ANY($5::text[])
    UNION SELECT 'org:' || organization_id FROM organisations WHERE organization_id = ANY($6::text[])
), heirs AS (
    -- One by one, by key: as a join the planner would rather read every account there is.
    SELECT p.account_id::text COLLATE "C" AS account_id, a.known, a.merged_into FROM parties p LEFT JOIN LATERAL (
        SELECT true AS known, merged_into::text COLLATE "C" FROM accounts WHERE account_id = p.account_id OFFSET 0
    ) a ON true WHERE p.account_id IS NOT NULL
    UNION
    SELECT h.merged_into, a.known, a.merged_into FROM heirs h LEFT JOIN LATERAL (
        SELECT true AS known, merged_into::text COLLATE "C" FROM accounts WHERE account_id = h.merged_into OFFSET 0
    ) a ON true WHERE h.merged_into IS NOT NULL
)
SELECT account_id, (SELECT EXISTS (SELECT FROM generations WHERE released_to IS NOT NULL AND state = 'held')), known
FROM heirs;

-- name: find_linked_parties
-- These accounts, the organisations of those who merge, the members of mirrors, all between which open holds move what they
-- release, and the heirs of all of them.
WITH RECURSIVE merging AS (
    SELECT unnest($2::text[]) COLLATE "C" AS account_id
    UNION SELECT n.heir FROM (
        SELECT (SELECT a.merged_into::text COLLATE "C" FROM accounts a WHERE a.account_id = merging.account_id) AS heir
        FROM merging) n WHERE n.heir IS NOT NULL
), linked AS (
    SELECT unnest($1::text[]) COLLATE "C" AS account_id
    UNION SELECT joined.account_id FROM merging CROSS JOIN LATERAL (
        SELECT ('org:' || m.organization_id) COLLATE "C" AS account_id FROM members m
        WHERE m.user_id = substr(merging.account_id, 6) OFFSET 0) joined
    UNION SELECT used.account_id FROM merging CROSS JOIN LATERAL (
        SELECT d.account_id::text COLLATE "C" AS account_id FROM usage_days d
        WHERE d.member_id = substr(merging.account_id, 6) AND d.member_id <> '' OFFSET 0) used
), heirs AS (
    SELECT account_id FROM linked
    UNION SELECT n.account_id FROM heirs CROSS JOIN LATERAL (
        SELECT (SELECT a.merged_into::text COLLATE "C" FROM accounts a WHERE a.account_id = heirs.account_id) AS account_id
        UNION ALL SELECT sole.account_id FROM organisations o CROSS JOIN LATERAL (
            SELECT ('user:' || m.user_id) COLLATE "C" AS account_id FROM members m
            WHERE m.organization_id = o.organization_id OFFSET 0) sole
        WHERE heirs.account_id LIKE 'org:%' AND o.organization_id = substr(heirs.account_id, 5) AND o.mode = 'mirror'
        UNION ALL SELECT g.released_to::text COLLATE "C" FROM generations g
        WHERE g.account_id = heirs.account_id AND g.released_to IS NOT NULL AND g.state = 'held'
        UNION ALL SELECT g.account_id::text COLLATE "C" FROM generations g
        WHERE g.released_to = heirs.account_id AND g.released_to IS NOT NULL AND g.state = 'held'
    ) n WHERE n.account_id IS NOT NULL
)
SELECT account_id FROM heirs;

-- name: find_fetched
-- Objects of Stripe's API that events left out and that were fetched.
SELECT path, body FROM stripe_objects WHERE path = ANY($1::text[]);

-- name: find_lacking
-- Objects that parked messages wait for and that nobody has fetched yet.
SELECT DISTINCT p.waits_for FROM parked p
WHERE p.provider = 'stripe_api' AND NOT EXISTS (SELECT FROM stripe_objects o WHERE o.path = p.waits_for) LIMIT $1;

-- name: keep_fetched
-- An object as it was when it was fetched.
INSERT INTO stripe_objects (path, body, fetched_at) VALUES ($1, $2::jsonb, clock_timestamp())
ON CONFLICT (path) DO NOTHING;

-- name: create_accounts
-- R1: created on first sight, in the order in which they will be locked.
INSERT INTO accounts (account_id) SELECT id FROM unnest($1::text[]) AS id ORDER BY id COLLATE "C"
ON CONFLICT DO NOTHING;

-- name: lock_accounts
-- One lock order for every writer: by account id. R12: the clock is read beside each row when it is locked, so that the last
-- one's is the time of the decision.
WITH locked AS MATERIALIZED (
    SELECT account_id, subscription, purchased, held, debt, version, chain_hash, tier, time_zone, state, merged_into,
           registered_at, signup_granted, allocate_at, updated_at
    FROM accounts WHERE account_id = ANY($1::text[]) ORDER BY account_id FOR UPDATE
)
SELECT *, clock_timestamp() AS locked_at FROM locked;

-- name: read_clock
-- R12: the time of a decision that locks no account.
SELECT clock_timestamp();

-- name: load_commands
-- The worker's memory of these keys.
SELECT c.scope, c.type, c.key, c.fingerprint
FROM unnest($1::text[], $2::text[], $3::text[]) AS wanted (scope, type, key)
CROSS JOIN LATERAL (
    SELECT * FROM commands c WHERE (c.key, c.type, c.scope) = (wanted.key, wanted.type, wanted.scope) OFFSET 0
) c;

-- name: load_lots
-- All open lots of accounts that give everything away, those that business objects name, open or not, and the next ones of
-- pools of accounts in the order in which they are consumed (R3), as the index has them. What is fully held is nothing to
-- consume: each of these is worth a credit at least.
SELECT lot_id, account_id, pool, granted, remaining, held, expired, clawed, expires_at, source_kind, source_reference,
       subscription_id, period_start, granted_version, granted_at, position, false AS in_order
FROM lots WHERE account_id = ANY($1::text[]) AND open
UNION ALL
SELECT lot_id, account_id, pool, granted, remaining, held, expired, clawed, expires_at, source_kind, source_reference,
       subscription_id, period_start, granted_version, granted_at, position, false
FROM lots WHERE lot_id = ANY($2::uuid[])
UNION ALL
SELECT lot_id, account_id, pool, granted, remaining, held, expired, clawed, expires_at, source_kind, source_reference,
       subscription_id, period_start, granted_version, granted_at, position, true
FROM unnest($3::text[], $4::text[]) AS wanted (id, of)
CROSS JOIN LATERAL (
    SELECT * FROM lots l WHERE l.account_id = wanted.id AND l.pool = wanted.of AND l.open AND l.remaining > l.held
    ORDER BY l.expires_at, l.granted_at, l.granted_version, l.position, l.lot_id LIMIT $5 OFFSET $6
) l;

-- name: load_generations
-- The generations that are named, and the holds that are past their deadline of locked accounts, or will release to them.
SELECT generation_id, account_id, member_id, state, kind, model, units, held, hold_allocation, deadline_at, taken,
       given_back, counted_on, released_to, recorded_at
FROM generations WHERE generation_id = ANY($1::text[])
UNION ALL
SELECT generation_id, account_id, member_id, state, kind, model, units, held, hold_allocation, deadline_at, taken,
       given_back, counted_on, released_to, recorded_at
FROM generations
WHERE state = 'held' AND deadline_at <= $3 AND account_id = ANY($2::text[]) AND NOT generation_id = ANY($1::text[])
UNION ALL
SELECT generation_id, account_id, member_id, state, kind, model, units, held, hold_allocation, deadline_at, taken,
       given_back, counted_on, released_to, recorded_at
FROM generations
WHERE released_to = ANY($2::text[]) AND released_to IS NOT NULL AND state = 'held' AND deadline_at <= $3
  AND NOT account_id = ANY($2::text[]) AND NOT generation_id = ANY($1::text[]);

-- name: load_holds
-- All open holds of accounts that merge or give their credits away, and those that will release to them.
SELECT generation_id, account_id, member_id, state, kind, model, units, held, hold_allocation, deadline_at, taken,
       given_back, counted_on, released_to, recorded_at
FROM unnest($2::text[]) AS wanted (id)
CROSS JOIN LATERAL (SELECT * FROM generations g WHERE g.state = 'held' AND g.account_id = wanted.id OFFSET 0) g
WHERE deadline_at > $3 AND NOT generation_id = ANY($1::text[])
UNION ALL
SELECT generation_id, account_id, member_id, state, kind, model, units, held, hold_allocation, deadline_at, taken,
       given_back, counted_on, released_to, recorded_at
FROM unnest($2::text[]) AS wanted (id)
CROSS JOIN LATERAL (
    SELECT * FROM generations g
    WHERE g.released_to = wanted.id AND g.released_to IS NOT NULL AND g.state = 'held' OFFSET 0
) g
WHERE deadline_at > $3 AND NOT account_id = ANY($2::text[]) AND NOT generation_id = ANY($1::text[]);

-- name: load_bookings
-- The bookings that are named.
SELECT booking_id, client_account, practitioner_account, state, credits, given_back, earning_lot, recorded_at
FROM bookings WHERE booking_id = ANY($1::text[]);

-- name: load_purchases
-- The business keys that are named, what the locked money paid for, and what the subscriptions that are named were
-- granted: raised periods have keys of their own.
SELECT purchase_key, account_id, kind, lot_id, credits, subscription_id, plan, period_start, period_end, invoice_id,
       payment_id, paid, month, worth, clawed, clawed_parts, catalogue_version, transaction_id, recorded_at
FROM purchases
WHERE purchase_key = ANY($1::text[]) OR payment_id = ANY($2::text[]) OR invoice_id = ANY($2::text[])
   OR subscription_id = ANY($3::text[]);

-- name: load_allocations
-- Yearly periods: those of locked accounts with months to come, and those of the subscriptions and the money that are
-- named, whether they go on or not.
SELECT allocation_key, subscription_id, anchor_at, period_end, account_id, plan, credits, next_month, next_at, invoice_id,
       payment_id, paid, returned
FROM allocations
WHERE (account_id = ANY($1::text[]) AND next_at IS NOT NULL) OR subscription_id = ANY($2::text[])
   OR invoice_id = ANY($3::text[]) OR payment_id = ANY($3::text[]);

-- name: load_subscriptions
-- The subscriptions that are named, and all of the locked accounts: together they decide the tier.
SELECT subscription_id, account_id, customer_id, plan, status, period_start, period_end, cancel_at, metadata, event_at,
       event_rank, event_id, recorded_at
FROM subscriptions WHERE subscription_id = ANY($1::text[]) OR account_id = ANY($2::text[]);

-- name: load_usage
-- Today's counters whatever the account's zone, and those of the days on which loaded generations were counted.
SELECT account_id, day, generations FROM usage_days
WHERE account_id = ANY($1::text[]) AND member_id = '' AND (day >= $2::date - 1 OR day = ANY($3::date[]));

-- name: load_organisations
-- The organisations whose accounts are locked, and those of who merges: in these, the locked users and, where all are
-- wanted or there is but one, all members. One row for each member, and one without for each organisation.
SELECT o.organization_id, o.mode, o.event_at, o.recorded_at, NULL AS user_id, NULL::bigint AS limit_credits, NULL AS period
FROM organisations o WHERE o.organization_id = ANY($1::text[])
UNION ALL
SELECT o.organization_id, o.mode, o.event_at, o.recorded_at, m.user_id::text, m.limit_credits, m.period
FROM organisations o CROSS JOIN LATERAL (
    SELECT * FROM members m WHERE m.organization_id = o.organization_id
      AND (o.mode = 'mirror' OR o.organization_id = ANY($2::text[]) OR m.user_id = ANY($3::text[])) OFFSET 0
) m WHERE o.organization_id = ANY($1::text[])
UNION ALL
SELECT o.organization_id, o.mode, o.event_at, o.recorded_at, m.user_id::text, m.limit_credits, m.period
FROM unnest($4::text[]) AS wanted (id)
CROSS JOIN LATERAL (SELECT * FROM members m WHERE m.user_id = wanted.id OFFSET 0) m
CROSS JOIN LATERAL (SELECT * FROM organisations o WHERE o.organization_id = m.organization_id OFFSET 0) o
WHERE NOT o.organization_id = ANY($1::text[]);

-- name: load_member_usage
-- What members used of locked organisations since a day, and on the days on which loaded generations were counted.
SELECT account_id, member_id, day, held, captured FROM usage_days
WHERE account_id = ANY($1::text[]) AND member_id = ANY($2::text[]) AND (day >= $3::date OR day = ANY($4::date[]));

-- name: update_accounts
-- The new totals of the accounts that changed, whose rows this transaction has locked.
UPDATE accounts a
SET subscription = n.subscription, purchased = n.purchased, held = n.held, debt = n.debt, version = n.version,
    chain_hash = n.chain_hash, tier = n.tier, time_zone = n.time_zone, state = n.state, merged_into = n.merged_into,
    registered_at = n.registered_at, signup_granted = n.signup_granted, allocate_at = n.allocate_at,
    updated_at = coalesce(n.updated_at, a.updated_at)
FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bytea[], $8::text[],
            $9::text[], $10::text[], $11::text[], $12::timestamptz[], $13::boolean[], $14::timestamptz[],
            $15::timestamptz[])
     AS n (account_id, subscription, purchased, held, debt, version, chain_hash, tier, time_zone, state, merged_into,
           registered_at, signup_granted, allocate_at, updated_at)
WHERE a.account_id = ANY (ARRAY[n.account_id]);

-- name: update_lots
-- What remains of lots that were there before, and whose they are: a merge moves them.
UPDATE lots l
SET account_id = n.account_id, remaining = n.remaining, held = n.held, expired = n.expired, clawed = n.clawed,
    expires_at = n.expires_at, granted_version = n.granted_version, position = n.position, open = n.remaining > 0
FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::timestamptz[],
            $8::bigint[], $9::int[])
     AS n (lot_id, account_id, remaining, held, expired, clawed, expires_at, granted_version, position)
WHERE l.lot_id = ANY (ARRAY[n.lot_id]);

-- name: update_generations
-- The new state of generations that were there before.
UPDATE generations g
SET account_id = n.account_id, member_id = n.member_id, state = n.state, held = n.held,
    hold_allocation = n.hold_allocation::jsonb, deadline_at = n.deadline_at, taken = n.taken, given_back = n.given_back,
    counted_on = n.counted_on, released_to = n.released_to, recorded_at = n.recorded_at
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::timestamptz[], $8::bigint[],
            $9::bigint[], $10::date[], $11::text[], $12::timestamptz[])
     AS n (generation_id, account_id, member_id, state, held, hold_allocation, deadline_at, taken, given_back, counted_on,
           released_to, recorded_at)
WHERE g.generation_id = ANY (ARRAY[n.generation_id]);

-- name: update_bookings
-- The new state of bookings that were there before.
UPDATE bookings b SET state = n.state, given_back = n.given_back
FROM unnest($1::text[], $2::text[], $3::bigint[]) AS n (booking_id, state, given_back)
WHERE b.booking_id = ANY (ARRAY[n.booking_id]);

-- name: update_purchases
-- What was clawed back of purchases that were there before, what paid for those that an audit granted, and how much it was
-- where that was told later.
UPDATE purchases p
SET clawed = n.clawed, clawed_parts = n.clawed_parts::jsonb, invoice_id = n.invoice_id, payment_id = n.payment_id, paid = n.paid
FROM unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::bigint[])
     AS n (purchase_key, clawed, clawed_parts, invoice_id, payment_id, paid)
WHERE p.purchase_key = ANY (ARRAY[n.purchase_key]);

-- name: update_allocations
-- Months granted, stopped, ended or moved.
UPDATE allocations a
SET account_id = n.account_id, period_end = n.period_end, credits = n.credits, next_month = n.next_month,
    next_at = n.next_at, returned = n.returned, invoice_id = n.invoice_id, payment_id = n.payment_id, paid = n.paid
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::bigint[], $5::int[], $6::timestamptz[], $7::bigint[], $8::text[],
            $9::text[], $10::bigint[])
     AS n (allocation_key, account_id, period_end, credits, next_month, next_at, returned, invoice_id, payment_id, paid)
WHERE a.allocation_key = ANY (ARRAY[n.allocation_key]);

-- name: update_payments
-- What was told of payments, whose rows this transaction has locked.
UPDATE payments p SET invoice_id = n.invoice_id, charge_id = n.charge_id, refunded = n.refunded
FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[]) AS n (payment_id, invoice_id, charge_id, refunded)
WHERE p.payment_id = ANY (ARRAY[n.payment_id]);

-- name: write_refunds
-- What is known of refunds.
INSERT INTO refunds (payment_id, refund_id, amount, status, recorded_at)
SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::timestamptz[])
ON CONFLICT (payment_id, refund_id) DO UPDATE SET amount = excluded.amount, status = excluded.status;

-- name: write_disputes
-- What is known of disputes; the steps come as one comma-separated text.
INSERT INTO disputes (payment_id, dispute_id, amount, steps, recorded_at)
SELECT payment_id, dispute_id, amount, string_to_array(steps, ','), recorded_at
FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::timestamptz[])
     AS n (payment_id, dispute_id, amount, steps, recorded_at)
ON CONFLICT (payment_id, dispute_id) DO UPDATE SET amount = excluded.amount, steps = excluded.steps;

-- name: write_subscriptions
-- Stripe's latest word on subscriptions. Whom their metadata were resolved to is whose they are, merges followed.
INSERT INTO subscriptions (subscription_id, account_id, customer_id, plan, status, period_start, period_end, cancel_at,
                           metadata, event_at, event_rank, event_id, recorded_at)
SELECT subscription_id, account_id, customer_id, plan, status, period_start, period_end, cancel_at,
       jsonb_set(metadata::jsonb, '{resolved_supabase_user_id}',
                 to_jsonb(substr(account_id, strpos(account_id, ':') + 1)), false),
       event_at, event_rank, event_id, recorded_at
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::timestamptz[], $7::timestamptz[],
            $8::timestamptz[], $9::text[], $10::timestamptz[], $11::int[], $12::text[], $13::timestamptz[])
     AS n (subscription_id, account_id, customer_id, plan, status, period_start, period_end, cancel_at, metadata,
           event_at, event_rank, event_id, recorded_at)
ON CONFLICT (subscription_id) DO UPDATE
SET account_id = excluded.account_id, customer_id = excluded.customer_id, plan = excluded.plan,
    status = excluded.status, period_start = excluded.period_start, period_end = excluded.period_end,
    cancel_at = excluded.cancel_at, metadata = excluded.metadata, event_at = excluded.event_at,
    event_rank = excluded.event_rank, event_id = excluded.event_id, recorded_at = excluded.recorded_at
-- Two words of one subscription may be decided at once, for two accounts: the later one stays.
WHERE (subscriptions.event_at, subscriptions.event_rank, subscriptions.event_id)
      <= (excluded.event_at, excluded.event_rank, excluded.event_id);

-- name: merge_purchases
-- What a merged account bought is its heir's.
UPDATE purchases p SET account_id = n.heir FROM unnest($1::text[], $2::text[]) AS n (source, heir)
WHERE p.account_id = ANY (ARRAY[n.source]);

-- name: merge_allocations
-- So are months that may begin again.
UPDATE allocations a SET account_id = n.heir FROM unnest($1::text[], $2::text[]) AS n (source, heir)
WHERE a.account_id = ANY (ARRAY[n.source]);

-- name: merge_subscriptions
-- So are its subscriptions, and that is whom their metadata are resolved to.
UPDATE subscriptions s
SET account_id = n.heir, metadata = jsonb_set(s.metadata, '{resolved_supabase_user_id}',
                                              to_jsonb(substr(n.heir, strpos(n.heir, ':') + 1)), false)
FROM unnest($1::text[], $2::text[]) AS n (source, heir)
WHERE s.account_id = ANY (ARRAY[n.source]);

-- name: merge_identities
-- And every external id that was its own.
UPDATE identities i SET owner = n.heir FROM unnest($1::text[], $2::text[]) AS n (source, heir)
WHERE i.owner = ANY (ARRAY[n.source]);

-- name: forward_merged
-- A merged account's own id means its heir from now on; one that was mapped otherwise stays as it was.
INSERT INTO identities (external_id, provider, owner, resolved_by, recorded_at)
SELECT substr(source, 6), 'user', heir, 'merge', $3
FROM unnest($1::text[], $2::text[]) AS n (source, heir) WHERE source LIKE 'user:%'
ORDER BY 1 ON CONFLICT DO NOTHING;

-- name: write_usage
-- The day's counters.
INSERT INTO usage_days (account_id, day, generations)
SELECT * FROM unnest($1::text[], $2::date[], $3::bigint[])
ON CONFLICT (account_id, member_id, day) DO UPDATE SET generations = excluded.generations;

-- name: write_organisations
-- What is told of organisations, whose accounts this transaction has locked.
INSERT INTO organisations (organization_id, mode, event_at, recorded_at)
SELECT * FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[])
ON CONFLICT (organization_id) DO UPDATE
SET mode = excluded.mode, event_at = excluded.event_at, recorded_at = excluded.recorded_at;

-- name: delete_members
-- Who left an organisation, or became part of somebody else.
DELETE FROM members m USING unnest($1::text[], $2::text[]) AS n (organization_id, user_id)
WHERE m.organization_id = ANY (ARRAY[n.organization_id]) AND m.user_id = ANY (ARRAY[n.user_id]);

-- name: write_members
-- Who belongs to an organisation, with limits.
INSERT INTO members (organization_id, user_id, limit_credits, period)
SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[])
ON CONFLICT (organization_id, user_id) DO UPDATE SET limit_credits = excluded.limit_credits, period = excluded.period;

-- name: write_member_usage
-- What members have in use, by day.
INSERT INTO usage_days (account_id, member_id, day, held, captured)
SELECT * FROM unnest($1::text[], $2::text[], $3::date[], $4::bigint[], $5::bigint[])
ON CONFLICT (account_id, member_id, day) DO UPDATE SET held = excluded.held, captured = excluded.captured;

-- name: merge_member_usage
-- What a merged account used of organisations counts for its heir, on the same days.
WITH gone AS (
    DELETE FROM usage_days d USING unnest($1::text[], $2::text[]) AS n (source, heir)
    CROSS JOIN LATERAL (
        SELECT u.account_id, u.member_id, u.day FROM usage_days u
        WHERE u.member_id = substr(n.source, 6) AND u.member_id <> '' OFFSET 0
    ) u
    WHERE d.account_id = ANY (ARRAY[u.account_id::text]) AND d.member_id = ANY (ARRAY[u.member_id])
      AND d.day = ANY (ARRAY[u.day])
    RETURNING d.account_id, substr(n.heir, 6) AS member_id, d.day, d.held, d.captured
)
INSERT INTO usage_days (account_id, member_id, day, held, captured)
SELECT account_id, member_id, day, sum(held), sum(captured) FROM gone GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
ON CONFLICT (account_id, member_id, day) DO UPDATE
SET held = usage_days.held + excluded.held, captured = usage_days.captured + excluded.captured;

-- name: merge_members
-- So do its open holds on organisations, whose end looks for its counter.
UPDATE generations g SET member_id = substr(n.heir, 6) FROM unnest($1::text[], $2::text[]) AS n (source, heir)
CROSS JOIN LATERAL (
    SELECT h.generation_id FROM generations h
    WHERE h.member_id = substr(n.source, 6) AND h.member_id IS NOT NULL AND h.deadline_at IS NOT NULL OFFSET 0
) h
WHERE g.generation_id = ANY (ARRAY[h.generation_id::text]);

-- name: write_dead_letters
-- Keep messages that could not be applied; one that is kept already, at the same coordinates, stays as it is.
INSERT INTO dead_letters (topic, partition, kafka_offset, record_hash, record_at, key, value, headers, reason, detail,
                          source, type, command_key, recorded_at)
SELECT topic, partition, kafka_offset, record_hash, record_at, key, value, headers::jsonb, reason, detail, source, type,
       command_key, clock_timestamp()
FROM unnest($1::text[], $2::int[], $3::bigint[], $4::bytea[], $5::timestamptz[], $6::bytea[], $7::bytea[], $8::text[],
            $9::text[], $10::text[], $11::text[], $12::text[], $13::text[])
     AS n (topic, partition, kafka_offset, record_hash, record_at, key, value, headers, reason, detail, source, type,
           command_key)
ORDER BY topic, partition, kafka_offset, record_hash
ON CONFLICT (topic, partition, kafka_offset, record_hash) DO NOTHING
RETURNING dead_letter_id, topic, partition, kafka_offset, reason;

-- name: return_dead_letters
-- Replayed messages that failed again: dead once more, under their own number.
UPDATE dead_letters d
SET state = 'dead', attempts = d.attempts + 1, reason = n.reason, detail = n.detail, settled_at = NULL
FROM unnest($1::bigint[], $2::text[], $3::text[]) AS n (dead_letter_id, reason, detail)
WHERE d.dead_letter_id = ANY (ARRAY[n.dead_letter_id]) AND (d.state = 'replaying') IS TRUE
RETURNING d.dead_letter_id, d.topic, d.partition, d.kafka_offset, d.reason;

-- name: settle_dead_letters
-- Replayed messages that ended otherwise than dead.
UPDATE dead_letters SET state = 'replayed', settled_at = clock_timestamp(), settled_reason = 'replayed'
WHERE dead_letter_id = ANY($1::bigint[]) AND (state = 'replaying') IS TRUE;

-- name: park
-- Keep messages that wait; one that waits already, at the same coordinates, stays as it is.
INSERT INTO parked (topic, partition, kafka_offset, record_hash, record_at, key, value, headers, provider, waits_for,
                    detail, source, type, command_key, parked_at, next_attempt_at, deadline_at)
SELECT topic, partition, kafka_offset, record_hash, record_at, key, value, headers::jsonb, provider, waits_for, detail,
       source, type, command_key, clock_timestamp(), clock_timestamp() + interval '1 second',
       clock_timestamp() + make_interval(secs => $15)
FROM unnest($1::text[], $2::int[], $3::bigint[], $4::bytea[], $5::timestamptz[], $6::bytea[], $7::bytea[], $8::text[],
            $9::text[], $10::text[], $11::text[], $12::text[], $13::text[], $14::text[])
     AS n (topic, partition, kafka_offset, record_hash, record_at, key, value, headers, provider, waits_for, detail,
           source, type, command_key)
ORDER BY topic, partition, kafka_offset, record_hash
ON CONFLICT (topic, partition, kafka_offset, record_hash) DO NOTHING
RETURNING topic, partition, kafka_offset, record_hash;

-- name: claim_parked
-- Messages whose wait is over: their time came, or what they wait for is known. Polling is the guarantee, so that no
-- wake-up can be missed; whoever claims one holds it until its transaction ends.
SELECT p.parked_id, p.topic, p.partition, p.kafka_offset, p.record_at, p.key, p.value, p.headers, p.dead_letter_id,
       p.attempts, p.deadline_at <= clock_timestamp() AS overdue
FROM parked p
WHERE p.next_attempt_at <= clock_timestamp()
   OR EXISTS (SELECT FROM identities i WHERE i.external_id = p.waits_for AND i.provider = p.provider)
   OR (p.provider = 'stripe_api' AND EXISTS (SELECT FROM stripe_objects o WHERE o.path = p.waits_for))
ORDER BY p.parked_id LIMIT $1 FOR UPDATE SKIP LOCKED;

-- name: wait_longer
-- Back-off of what still waits: twice as long each time, at most five minutes.
UPDATE parked p
SET attempts = p.attempts + 1, provider = n.provider, waits_for = n.waits_for, detail = n.detail,
    next_attempt_at = clock_timestamp() + make_interval(secs => least(300, 2 ^ least(p.attempts, 10)))
FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[]) AS n (parked_id, provider, waits_for, detail)
WHERE p.parked_id = ANY (ARRAY[n.parked_id]);

-- name: unpark
-- Messages that wait no longer.
DELETE FROM parked WHERE parked_id = ANY($1::bigint[]);

-- name: beat
-- Say that this worker lives, and what it consumes.
INSERT INTO heartbeats (worker_id, pid, topics, beat_at, started_at)
VALUES ($1, $2, $3, clock_timestamp(), clock_timestamp())
ON CONFLICT (worker_id) DO UPDATE SET topics = excluded.topics, beat_at = excluded.beat_at;

-- name: stop_beating
-- A worker that stops says so; one that died is forgotten after a while.
DELETE FROM heartbeats WHERE worker_id = $1 OR beat_at < clock_timestamp() - interval '1 hour';

-- name: announce_relay
-- A relay is here, as long as its session lives; any number of them hold this lock.
SELECT pg_advisory_lock_shared($1, $2);

-- name: count_relays
-- How many have said so, and still live.
SELECT count(*) FROM pg_locks
WHERE locktype = 'advisory' AND mode = 'ShareLock' AND granted AND classid = $1::oid AND objid = $2::oid
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database());

-- name: take_shards
-- One publisher for each shard, as long as its session lives: of these, so many at most.
SELECT shard FROM unnest($2::integer[]) AS shard WHERE pg_try_advisory_lock($1, shard) LIMIT $3;

-- name: give_shards_back
-- Whoever lacks some takes them.
SELECT pg_advisory_unlock($1, shard) FROM unnest($2::integer[]) AS shard;

-- name: read_outbox
-- The oldest rows of the owned shards, as many as stay below a number of bytes, and one at least. Never "after the last
-- one": a row that commits late has a lower number. Left out: some topics, and on some topics some keys.
WITH oldest AS (
    SELECT o.sequence, o.id, o.aggregatetype, o.aggregateid, o.type, o.payload, o.headers, d.key, d.value,
           d.headers AS record_headers, d.topic AS record_topic, d.partition AS record_partition,
           d.kafka_offset AS record_offset, d.reason, d.detail, d.dead_letter_id,
           sum(octet_length(o.payload) + coalesce(octet_length(d.value), 0))
               OVER (ORDER BY o.sequence ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS bytes_before
    FROM (
        SELECT * FROM outbox WHERE shard = ANY($1::smallint[]) AND aggregatetype <> ALL($4::text[])
            AND (aggregatetype, aggregateid) NOT IN (SELECT * FROM unnest($5::text[], $6::text[]))
        ORDER BY sequence LIMIT $2) o
    LEFT JOIN LATERAL (SELECT * FROM dead_letters d WHERE d.dead_letter_id = o.dead_letter_id OFFSET 0) d ON true
)
SELECT * FROM oldest WHERE bytes_before IS NULL OR bytes_before < $3 ORDER BY sequence;

-- name: mark_outbox
-- The oldest rows of the owned shards that are there now, and a place in the log behind the commits of all of them: the snapshot
-- is taken before the place is asked for. No row where there is no such slot.
-- Left out: some topics, and on some topics some keys.
SELECT ARRAY(SELECT sequence FROM outbox WHERE shard = ANY($2::smallint[]) AND aggregatetype <> ALL($4::text[])
                 AND (aggregatetype, aggregateid) NOT IN (SELECT * FROM unnest($5::text[], $6::text[]))
             ORDER BY sequence LIMIT $3) AS sequences,
       pg_current_wal_insert_lsn()::text AS place
FROM pg_replication_slots WHERE slot_name = $1 AND database = current_database();

-- name: has_passed
-- Whether the slot's reader has confirmed more than this place. A slot that was made at this very place has confirmed nothing.
SELECT confirmed_flush_lsn > $2::text::pg_lsn FROM pg_replication_slots
WHERE slot_name = $1 AND database = current_database();

-- name: read_outbox_rows
-- As `read_outbox`, of these rows alone.
WITH oldest AS (
    SELECT o.sequence, o.id, o.aggregatetype, o.aggregateid, o.type, o.payload, o.headers, d.key, d.value,
           d.headers AS record_headers, d.topic AS record_topic, d.partition AS record_partition,
           d.kafka_offset AS record_offset, d.reason, d.detail, d.dead_letter_id,
           sum(octet_length(o.payload) + coalesce(octet_length(d.value), 0))
               OVER (ORDER BY o.sequence ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS bytes_before
    FROM (
        SELECT * FROM outbox WHERE sequence = ANY($1::bigint[]) AND aggregatetype <> ALL($3::text[])
            AND (aggregatetype, aggregateid) NOT IN (SELECT * FROM unnest($4::text[], $5::text[]))) o
    LEFT JOIN LATERAL (SELECT * FROM dead_letters d WHERE d.dead_letter_id = o.dead_letter_id OFFSET 0) d ON true
)
SELECT * FROM oldest WHERE bytes_before IS NULL OR bytes_before < $2 ORDER BY sequence;

-- name: settle_outbox
-- What the broker acknowledged is gone.
DELETE FROM outbox WHERE sequence = ANY($1::bigint[]);

-- name: find_due_accounts
-- Accounts that time has done something to: holds past their deadline, lots past their expiry with credits unheld, months
-- of yearly periods that have begun.
-- The clock is read in a subquery, once: a volatile call beside the column would keep the index from being used. Each order
-- is that of the index to read: any index of open rows alone would do for the rest.
SELECT account_id FROM (
    SELECT account_id FROM generations
    WHERE state = 'held' AND deadline_at <= (SELECT clock_timestamp()) AND account_id <> ALL($2::text[])
    ORDER BY deadline_at LIMIT $1) lapsed
UNION
SELECT account_id FROM (
    SELECT account_id FROM lots
    WHERE open AND expires_at <= (SELECT clock_timestamp()) AND remaining > held AND account_id <> ALL($2::text[])
    ORDER BY expires_at LIMIT $1) expired
UNION
SELECT account_id FROM (
    SELECT account_id FROM accounts
    WHERE allocate_at <= (SELECT clock_timestamp()) AND account_id <> ALL($2::text[])
    ORDER BY allocate_at LIMIT $1) began
LIMIT $1;

-- name: claim_patrol
-- One worker counts at a time, and once in a while: the rest find the row locked, or read not long ago. Not up to now: what
-- a transaction recorded that is still open would be passed over. For the rest of this transaction what is ordered is read in
-- the order of its index: a planner that thinks the rows few would rather read all of them, sort, and keep the first.
SELECT read_until, judged_from, clock_timestamp() AS now, set_config('enable_sort', 'off', true) FROM patrol
WHERE read_until <= clock_timestamp() - make_interval(secs => $1::float8 + $2::float8) FOR UPDATE SKIP LOCKED;

-- name: find_patrol_end
-- How far so many rows reach; all that was recorded at one moment is counted at once. Only a rejection has a reason.
SELECT least($2::timestamptz,
    (SELECT recorded_at FROM entries WHERE balance_before <> balance_after AND recorded_at > $1
     ORDER BY recorded_at OFFSET $3::bigint - 1 LIMIT 1),
    (SELECT recorded_at FROM commands WHERE reason IS NOT NULL AND recorded_at > $1
     ORDER BY recorded_at OFFSET $3::bigint - 1 LIMIT 1)) AS read_until;

-- name: count_activity
-- Add what was recorded after one moment and up to another to the hours of its accounts; those that are worth a look now.
-- Grants are what somebody gave or bought: not the months and periods of a subscription, nor earnings, nor old books.
WITH counted AS (
    INSERT INTO activity AS a (account_id, hour, spent, rejected, granted)
    SELECT account_id, date_trunc('hour', recorded_at, 'UTC'), sum(spent), sum(rejected), sum(granted)
    FROM (
        SELECT account_id, recorded_at, 0 AS rejected,
               CASE WHEN kind IN ('generation_capture', 'generation_debit', 'booking_debit', 'transfer')
                    THEN greatest(0, -subscription_delta - purchased_delta) ELSE 0 END AS spent,
               CASE WHEN kind IN ('signup_grant', 'purchase', 'promotion', 'adjustment')
                         AND subscription_delta + purchased_delta > 0 THEN 1 ELSE 0 END AS granted
        FROM entries
        WHERE balance_before <> balance_after AND recorded_at > $1 AND recorded_at <= $2
        UNION ALL
        SELECT account_id, recorded_at, 1, 0, 0 FROM commands
        WHERE reason IS NOT NULL AND recorded_at > $1 AND recorded_at <= $2 AND account_id IS NOT NULL
    ) recorded
    WHERE spent + rejected + granted > 0
    GROUP BY 1, 2
    ON CONFLICT (account_id, hour) DO UPDATE
    SET spent = a.spent + excluded.spent, rejected = a.rejected + excluded.rejected, granted = a.granted + excluded.granted
    RETURNING account_id, hour, spent, rejected, granted
)
SELECT account_id, hour, spent, rejected, granted FROM counted
WHERE hour >= $3 AND (spent >= $4::bigint OR rejected >= $5::bigint OR granted >= $6::bigint);

-- name: load_past
-- What the accounts of these hours spent in so many hours before, and since when each exists.
SELECT n.account_id, n.hour, before.spent, coalesce(a.created_at, n.hour) AS created_at
FROM unnest($1::text[], $2::timestamptz[]) AS n (account_id, hour)
LEFT JOIN LATERAL (SELECT created_at FROM accounts a WHERE a.account_id = n.account_id OFFSET 0) a ON true
CROSS JOIN LATERAL (
    SELECT coalesce(sum(p.spent), 0)::bigint AS spent
    FROM (SELECT * FROM activity WHERE account_id = n.account_id OFFSET 0) p
    WHERE p.hour >= n.hour - make_interval(hours => $3::int) AND p.hour < n.hour
) before;

-- name: load_unusual
-- The patterns that these accounts show already.
SELECT account_id, code, since, last_hour FROM unusual WHERE account_id = ANY($1::text[]);

-- name: write_unusual
-- Patterns that began, or last for another hour.
INSERT INTO unusual (account_id, code, since, last_hour)
SELECT * FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[])
ON CONFLICT (account_id, code) DO UPDATE SET since = excluded.since, last_hour = excluded.last_hour;

-- name: forget_unusual
-- Patterns that are over, so many at once.
DELETE FROM unusual WHERE ctid = ANY(ARRAY(SELECT ctid FROM unusual WHERE last_hour < $1 ORDER BY last_hour LIMIT $2));

-- name: forget_activity
-- Hours that are nobody's past any more, so many at once.
DELETE FROM activity WHERE ctid = ANY(ARRAY(SELECT ctid FROM activity WHERE hour < $1 ORDER BY hour LIMIT $2));

-- name: move_patrol
-- What was counted is not counted again.
UPDATE patrol SET read_until = $1;

-- name: ask_settings
-- How a session is set up. The catalogue's view of them would be read whole.
SELECT name, current_setting(name) AS setting FROM unnest($1::text[]) AS name;

-- name: ask_rights
-- What the role that writes may do to the journal, who logged in and may become, and which guards of the books are off.
SELECT current_user::text AS acts_as,
       array_remove(ARRAY[
           CASE WHEN has_any_column_privilege('entries', 'UPDATE') THEN 'UPDATE' END,
           CASE WHEN has_table_privilege('entries', 'DELETE') THEN 'DELETE' END,
           CASE WHEN has_table_privilege('entries', 'TRUNCATE') THEN 'TRUNCATE' END], NULL) AS rewrites,
       session_user::text AS logs_in_as,
       coalesce((SELECT rolsuper FROM pg_roles WHERE rolname = session_user), false) AS logs_in_as_superuser,
       pg_has_role(session_user, (SELECT relowner FROM pg_class WHERE oid = 'entries'::regclass), 'MEMBER') AS may_be_owner,
       has_parameter_privilege(session_user, 'session_replication_role', 'SET') AS may_put_guards_to_sleep,
       ARRAY(SELECT tgname::text FROM pg_trigger WHERE tgrelid IN ('entries'::regclass, 'accounts'::regclass)
             AND NOT tgisinternal AND tgenabled = 'D' ORDER BY tgname) AS asleep;

-- name: measure_outbox
-- How many messages wait to be published, up to a bound: what is beyond it is not counted.
SELECT count(*) FROM (SELECT FROM outbox LIMIT $1) waiting;
