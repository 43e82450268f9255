-- An entry begins where its account stands. Migration 0004 looked its predecessor up in the journal: of an account that had
-- rested for long that is a page which nobody has in memory, read once for each new entry, and a ledger larger than its
-- server's memory waited for that more than for anything else. The account's row is locked and at hand, and it stands where
-- the last entry left it: the second function sees to that whenever it is written, now of its time too. Where the row is
-- not the predecessor's, in the middle of a statement or before the account followed, the journal is asked as before.
SET LOCAL ROLE credits_owner;
SET LOCAL search_path = credits;

CREATE OR REPLACE FUNCTION refuse_entries_without_their_predecessor() RETURNS trigger LANGUAGE plpgsql
    SET enable_seqscan = off AS $$
DECLARE wrong record;
BEGIN
    SELECT n.account_id, n.version INTO wrong
    FROM fresh n LEFT JOIN LATERAL (
        SELECT a.chain_hash AS hash, a.subscription + a.purchased AS balance_after, a.subscription AS subscription_after,
               a.held AS held_after, a.debt AS debt_after, a.updated_at AS recorded_at
        FROM credits.accounts a WHERE a.account_id = n.account_id AND a.version = n.version - 1 AND n.version > 1 OFFSET 0
    ) account ON true LEFT JOIN LATERAL (
        SELECT account.* WHERE account.hash IS NOT NULL
        UNION ALL
        SELECT e.hash, e.balance_after, e.subscription_after, e.held_after, e.debt_after, e.recorded_at
        FROM credits.entries e
        WHERE account.hash IS NULL AND e.account_id = n.account_id AND e.version = n.version - 1
    ) before ON true
    WHERE (before.hash IS NULL) <> (n.version = 1)
       OR (coalesce(before.hash, ''), coalesce(before.balance_after, 0),
           coalesce(before.subscription_after, 0) + n.subscription_delta,
           coalesce(before.held_after, 0) + n.held_delta, coalesce(before.debt_after, 0) + n.debt_delta)
          <> (n.previous_hash, n.balance_before, n.subscription_after, n.held_after, n.debt_after)
       OR n.recorded_at < before.recorded_at  -- R12
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'an entry does not begin where its predecessor ended'
            USING ERRCODE = 'check_violation', SCHEMA = 'credits', TABLE = 'entries',
                  CONSTRAINT = 'an_entry_begins_where_its_predecessor_ended',
                  DETAIL = format('Version %s of %s.', wrong.version, wrong.account_id);
    END IF;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION refuse_totals_of_no_entry() RETURNS trigger LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE wrong record;
BEGIN
    SELECT n.account_id, n.version INTO wrong
    FROM fresh n LEFT JOIN LATERAL (
        SELECT e.version, e.hash, e.subscription_after, e.purchased_after, e.held_after, e.debt_after, e.recorded_at
        FROM credits.entries e WHERE e.account_id = n.account_id ORDER BY e.version DESC LIMIT 1
    ) latest ON true
    WHERE (coalesce(latest.version, 0), coalesce(latest.hash, ''), coalesce(latest.subscription_after, 0),
           coalesce(latest.purchased_after, 0), coalesce(latest.held_after, 0), coalesce(latest.debt_after, 0))
          <> (n.version, n.chain_hash, n.subscription, n.purchased, n.held, n.debt)
       OR n.updated_at < latest.recorded_at  -- R12: the next entry may be as old as this
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'an account does not stand where its last entry left it'
            USING ERRCODE = 'check_violation', SCHEMA = 'credits', TABLE = 'accounts',
                  CONSTRAINT = 'an_account_stands_where_its_last_entry_left_it',
                  DETAIL = format('Version %s of %s.', wrong.version, wrong.account_id);
    END IF;
    RETURN NULL;
END $$;

RESET ROLE;  -- the runner records this file as the login
