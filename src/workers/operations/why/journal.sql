-- What is asked of an account and of its journal. Each block is a name, a sentence and a query; `journal.py` reads them by name.
-- $1 is the account, or the ids that are looked up. Where entries are summed, it is those after version $3 and up to version $2.

-- name: account
-- The account, the clock, and its last entry by then. An account's times never go back (R12).
SELECT a.account_id, a.state, a.tier, a.time_zone, a.version, a.subscription, a.purchased, a.held, a.debt,
       clock_timestamp() AS now, greatest(clock_timestamp(), a.updated_at) AS decided_at, e.version AS last_version,
       e.subscription_after, e.purchased_after, e.held_after, e.debt_after,
       (SELECT recorded_at FROM entries WHERE account_id = $1 AND version = 1) AS first_at
FROM accounts a LEFT JOIN LATERAL (
    SELECT version, subscription_after, purchased_after, held_after, debt_after FROM entries
    WHERE account_id = $1 AND ($2::timestamptz IS NULL OR recorded_at <= $2) ORDER BY version DESC LIMIT 1) e ON true
WHERE a.account_id = $1;

-- name: merged_into
-- What became of an account that the asked text names itself.
SELECT merged_into, (SELECT recorded_at FROM entries WHERE account_id = $1 AND kind = 'merge'
                     ORDER BY version DESC LIMIT 1) AS merged_at
FROM accounts WHERE account_id = $1 AND merged_into IS NOT NULL;

-- name: sums
-- All that a journal says in sums: how many entries, and where they lead.
SELECT count(*) AS entries, coalesce(sum(subscription_delta), 0)::bigint AS subscription,
       coalesce(sum(purchased_delta), 0)::bigint AS purchased, coalesce(sum(held_delta), 0)::bigint AS held,
       coalesce(sum(debt_delta), 0)::bigint AS debt
FROM entries WHERE account_id = $1 AND version > $3 AND version <= $2;

-- name: lots
-- Lots as the journal has them, beside their own rows; each with the totals of its class, open or used up. Open lots come
-- in consumption order (R3).
--
-- A lot that a merge brought, or that was used up before the merge and then restored here (R7), was not granted here: what
-- did not arrive here went elsewhere. Of a lot that clawback_reversal made the first restoration is the grant. A journal
-- that is summed only in part ($3 > 0) tells nothing about a whole lot, so that its row is taken as it is.
--
-- $4 says whether $5, the moment, is a past one; $6, $7 and $8 how many lots are told that are open, used up, and wrong; $9 are
-- the kinds that carry credits elsewhere, $10 all that take credits without spending them.
WITH by_lot AS (
    SELECT m.lot_id, min(m.pool) AS pool, min(e.version) AS arrived_version,
           coalesce(sum(m.amount) FILTER (
               WHERE m.amount > 0 AND e.kind NOT IN ('merge', 'clawback_reversal')), 0)::bigint AS granted_here,
           coalesce(sum(m.amount) FILTER (WHERE m.amount > 0 AND e.kind = 'merge'), 0)::bigint AS merged_in,
           coalesce(sum(m.amount) FILTER (WHERE m.amount > 0 AND e.kind = 'clawback_reversal'), 0)::bigint AS restored,
           coalesce(-sum(m.amount) FILTER (WHERE m.amount < 0 AND e.kind = 'expiry'), 0)::bigint AS expired,
           coalesce(-sum(m.amount) FILTER (WHERE m.amount < 0 AND e.kind = 'clawback'), 0)::bigint AS clawed,
           coalesce(-sum(m.amount) FILTER (WHERE m.amount < 0 AND e.kind = ANY ($9::text[])), 0)::bigint AS moved,
           coalesce(-sum(m.amount) FILTER (WHERE m.amount < 0 AND e.kind <> ALL ($10::text[])), 0)::bigint AS spent,
           sum(m.amount)::bigint AS net, sum(m.held)::bigint AS net_held
    FROM entries e
    CROSS JOIN LATERAL jsonb_to_recordset(e.allocation) AS m (lot_id uuid, pool text, amount bigint, held bigint)
    WHERE e.account_id = $1 AND e.version > $3 AND e.version <= $2
    GROUP BY m.lot_id
), paired AS (
    SELECT j.lot_id, l.lot_id IS NOT NULL AS known, l.account_id IS NOT DISTINCT FROM $1 AS mine, true AS told,
           coalesce(l.pool, j.pool) AS pool, coalesce(l.granted, j.granted_here) AS granted, l.remaining, l.held,
           l.expired AS stored_expired, l.clawed AS stored_clawed, l.expires_at, l.source_kind, l.source_reference,
           l.granted_version, l.granted_at, l.position, j.arrived_version, j.merged_in, j.restored, j.expired, j.clawed, j.moved,
           j.spent, j.net, j.net_held,
           CASE WHEN j.granted_here > 0 THEN j.granted_here
                WHEN l.source_kind = 'clawback_reversal' AND j.restored >= l.granted AND j.merged_in = 0
                     AND j.arrived_version = l.granted_version THEN l.granted ELSE 0 END AS granted_here
    FROM by_lot j LEFT JOIN lots l ON l.lot_id = j.lot_id
    UNION ALL
    SELECT l.lot_id, true, true, false, l.pool, l.granted, l.remaining, l.held, l.expired, l.clawed, l.expires_at,
           l.source_kind, l.source_reference, l.granted_version, l.granted_at, l.position, l.granted_version, 0, 0, 0, 0, 0,
           0, 0, 0, 0
    FROM lots l
    WHERE l.account_id = $1 AND l.open AND NOT $4 AND NOT EXISTS (SELECT FROM by_lot j WHERE j.lot_id = l.lot_id)
), placed_in_time AS (
    SELECT p.*, $3::bigint > 0 AS in_part, NOT $4::boolean AND mine AS by_row, told AND granted_here = 0 AS from_elsewhere,
           CASE WHEN source_kind = 'clawback_reversal' THEN restored - granted_here ELSE restored END AS given_back
    FROM paired p
), counted AS (
    SELECT lot_id, known, mine, told, in_part, by_row, from_elsewhere, pool, expires_at, source_kind, source_reference,
           granted_at, granted_version, position, granted, net, net_held, remaining AS stored_remaining, held AS stored_held, stored_expired,
           stored_clawed, CASE WHEN in_part THEN granted_version ELSE arrived_version END AS arrived_version,
           CASE WHEN from_elsewhere AND NOT in_part THEN granted - merged_in - greatest(0, given_back - clawed) ELSE 0
           END AS elsewhere,
           CASE WHEN by_row THEN remaining ELSE net END AS remaining,
           CASE WHEN by_row THEN held ELSE net_held END AS held,
           CASE WHEN in_part THEN coalesce(stored_expired, 0) ELSE expired END AS expired,
           CASE WHEN in_part THEN coalesce(stored_clawed, 0) WHEN from_elsewhere THEN greatest(0, clawed - given_back)
                ELSE clawed - given_back END AS clawed,
           CASE WHEN in_part THEN 0 ELSE moved END AS moved,
           CASE WHEN in_part THEN granted - remaining - stored_expired - stored_clawed ELSE spent END AS spent
    FROM placed_in_time
    WHERE NOT in_part OR by_row
), judged AS (
    SELECT c.*, remaining > 0 AS open, coalesce(expires_at <= $5::timestamptz, false) AS lapsed,
           NOT known OR (NOT $4 AND NOT mine AND net <> 0)
           OR granted <> elsewhere + remaining + spent + expired + clawed + moved
           OR least(elsewhere, remaining, spent, expired, clawed, held, remaining - held) < 0
           OR (by_row AND NOT in_part AND (stored_remaining <> net OR stored_held <> net_held
               OR (NOT from_elsewhere AND (stored_expired <> expired OR stored_clawed <> clawed)))) AS wrong
    FROM counted c
), totals AS (
    SELECT open, count(*) AS all_lots, sum(granted)::bigint AS all_granted, sum(elsewhere)::bigint AS all_elsewhere,
           sum(spent)::bigint AS all_spent, sum(expired)::bigint AS all_expired, sum(clawed)::bigint AS all_clawed,
           sum(moved)::bigint AS all_moved, sum(remaining)::bigint AS all_remaining, sum(held)::bigint AS all_held,
           coalesce(sum(remaining) FILTER (WHERE pool = 'subscription'), 0)::bigint AS all_subscription,
           coalesce(sum(remaining - held) FILTER (WHERE lapsed), 0)::bigint AS all_lapsed,
           count(*) FILTER (WHERE wrong) AS all_wrong
    FROM judged GROUP BY open
), sources AS (
    SELECT coalesce(source_kind, '') AS source_kind, count(*) AS lots, sum(remaining)::bigint AS credits
    FROM judged WHERE open GROUP BY 1
), placed AS (
    SELECT j.*, row_number() OVER (PARTITION BY open ORDER BY
               CASE WHEN open THEN pool END DESC, CASE WHEN open THEN expires_at END ASC NULLS LAST,
               CASE WHEN NOT open THEN granted_at END DESC, CASE WHEN NOT open THEN granted_version END DESC,
               granted_at, granted_version, position, lot_id) AS place,
           row_number() OVER (PARTITION BY open, wrong ORDER BY granted_version, position, lot_id) AS wrong_place
    FROM judged j
)
SELECT *, (SELECT jsonb_agg(s ORDER BY s.credits DESC, s.source_kind) FROM sources s) AS sources
FROM placed JOIN totals USING (open)
WHERE place <= CASE WHEN open THEN $6::bigint ELSE $7::bigint END OR (wrong AND wrong_place <= $8::bigint)
ORDER BY open DESC, place;

-- name: grants
-- What is known of the grants of listed lots: the purchase, the entry that brought it, the import or transfer behind it.
SELECT w.lot_id, p.plan, p.period_start, p.period_end, p.subscription_id, p.invoice_id, p.payment_id, e.cause,
       e.kind AS entry_kind, e.transaction_id, c.account_id AS commanded_for, i.purchase_key AS import_key,
       CASE WHEN e.kind IN ('subscription_grant', 'session_earning') THEN (
           SELECT coalesce(-sum(m.amount), 0)::bigint FROM jsonb_to_recordset(e.allocation) AS m (amount bigint)
           WHERE m.amount < 0) ELSE 0 END AS rolled_in
FROM unnest($2::uuid[], $3::text[], $4::bigint[]) AS w (lot_id, reference, version)
LEFT JOIN purchases p ON p.purchase_key = w.reference
LEFT JOIN entries e ON e.account_id = $1 AND e.version = w.version
    AND e.allocation @> jsonb_build_array(jsonb_build_object('lot_id', w.lot_id))
LEFT JOIN purchases i ON i.account_id = $1 AND i.kind = 'import' AND i.transaction_id = e.transaction_id
LEFT JOIN commands c ON e.kind = 'transfer' AND c.key = e.cause ->> 'idempotency_key' AND c.type = e.cause ->> 'type'
    AND c.scope = e.cause ->> 'source';

-- name: spent
-- Spending by what it was for. What came back for the same thing stands beside it. Only an old system's generations and
-- bookings have no id.
WITH changes AS (
    SELECT CASE WHEN kind = 'debt_payment' THEN 'debt'
                WHEN kind = 'transfer' AND (cause ? 'organization_id' OR cause ? 'generation_id') THEN 'change_of_mode'
                WHEN cause ? 'generation_id' THEN 'generation'
                WHEN kind IN ('generation_debit', 'booking_debit') AND NOT cause ? 'booking_id' THEN 'imported'
                WHEN NOT cause ? 'booking_id' THEN kind
                WHEN subscription_delta + purchased_delta < 0 AND kind = 'booking_reversal' THEN 'booking_given_back'
                ELSE 'booking' END AS thing,
           CASE WHEN kind = 'debt_payment' THEN ''
                WHEN kind = 'transfer' AND cause ? 'generation_id' THEN 'hold of generation ' || (cause ->> 'generation_id')
                ELSE coalesce(cause ->> 'organization_id', cause ->> 'generation_id', cause ->> 'booking_id',
                              cause ->> 'idempotency_key') END AS id,
           subscription_delta + purchased_delta AS amount, recorded_at
    FROM entries
    WHERE account_id = $1 AND version > $3 AND version <= $2 AND kind <> ALL ($4::text[])
      AND (subscription_delta + purchased_delta < 0 OR kind IN ('generation_refund', 'booking_reversal'))
), things AS (
    SELECT thing, coalesce(id, '') AS id, (-sum(amount) FILTER (WHERE amount < 0))::bigint AS credits,
           coalesce(sum(amount) FILTER (WHERE amount > 0), 0)::bigint AS given_back, max(recorded_at) AS last_at
    FROM changes GROUP BY thing, coalesce(id, '') HAVING count(*) FILTER (WHERE amount < 0) > 0
)
SELECT things.*, (sum(credits) OVER ())::bigint AS all_credits, count(*) OVER () AS all_things
FROM things ORDER BY credits DESC, last_at DESC, thing, id LIMIT $5;

-- name: held
-- What is held now.
SELECT generation_id, credits, recorded_at AS since, deadline_at, deadline_at <= $2 AS overdue,
       (sum(credits) OVER ())::bigint AS all_credits, count(*) OVER () AS all_holds
FROM holds WHERE account_id = $1 ORDER BY deadline_at, generation_id LIMIT $3;

-- name: held_then
-- What was held at a version. Holds that a merge brought have no entry of their own on this account.
WITH by_generation AS (
    SELECT cause ->> 'generation_id' AS generation_id, sum(held_delta)::bigint AS credits, min(recorded_at) AS since
    FROM entries
    WHERE account_id = $1 AND version > $3 AND version <= $2 AND held_delta <> 0 AND cause ? 'generation_id'
    GROUP BY 1 HAVING sum(held_delta) > 0
)
SELECT h.*, g.deadline_at, coalesce(g.deadline_at <= $4, false) AS overdue,
       (sum(h.credits) OVER ())::bigint AS all_credits, count(*) OVER () AS all_holds
FROM by_generation h LEFT JOIN generations g USING (generation_id)
ORDER BY h.since, h.generation_id LIMIT $5;

-- name: debt
-- The changes of what is owed since nothing was.
WITH changes AS (
    SELECT version, recorded_at, kind, cause, transaction_id, subscription_delta + purchased_delta AS change, debt_delta, debt_after,
           row_number() OVER (ORDER BY version) AS place, count(*) OVER () AS all_changes
    FROM entries
    WHERE account_id = $1 AND version <= $2 AND debt_delta <> 0 AND version > coalesce((
        SELECT version FROM entries WHERE account_id = $1 AND version <= $2 AND debt_after = 0
        ORDER BY version DESC LIMIT 1), 0)
)
SELECT c.*, i.purchase_key AS import_key
FROM changes c LEFT JOIN purchases i ON i.account_id = $1 AND i.kind = 'import' AND i.transaction_id = c.transaction_id
WHERE place = 1 OR place > all_changes - $3 + 1 ORDER BY version;

-- name: recent
-- The newest entries.
WITH latest AS (
    SELECT version, recorded_at, kind, cause, transaction_id, subscription_delta + purchased_delta AS amount,
           balance_before, balance_after, held_delta, held_after, debt_delta, debt_after
    FROM entries WHERE account_id = $1 AND version <= $2 ORDER BY version DESC LIMIT $3
)
SELECT e.*, i.purchase_key AS import_key
FROM latest e LEFT JOIN purchases i ON i.account_id = $1 AND i.kind = 'import' AND i.transaction_id = e.transaction_id
ORDER BY version DESC;

-- name: generations
-- What generations made.
SELECT generation_id, kind, model, units FROM generations WHERE generation_id = ANY ($1::text[]);

-- name: bookings
-- Between whom bookings are.
SELECT booking_id, client_account, practitioner_account FROM bookings WHERE booking_id = ANY ($1::text[]);

-- name: merged_from
-- Which account a merge's transaction closed. Its id was forwarded to the heir, and its last entry is the merge.
SELECT e.transaction_id, e.account_id
FROM identities i
JOIN accounts a ON a.account_id = 'user:' || i.external_id
JOIN entries e ON e.account_id = a.account_id AND e.version = a.version
WHERE i.owner = $1 AND a.account_id <> $1 AND e.kind = 'merge' AND e.transaction_id = ANY ($2::uuid[]);

-- name: usage
-- How many generations of a day count.
SELECT generations FROM usage_days WHERE account_id = $1 AND member_id = '' AND day = $2;
