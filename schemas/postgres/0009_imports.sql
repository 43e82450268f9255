-- What came from the old systems: each run, each source row with what it became, and the views that their readers know.
SET LOCAL ROLE credits_owner;
SET LOCAL search_path = credits;

-- One row for each run of an import. `source` names host and database, never a login.
CREATE TABLE imports (
    import_id   uuid PRIMARY KEY,
    kind        text NOT NULL CHECK (kind IN ('credits-records', 'practitioner-credits', 'points', 'user-org-balances', 'profiles')),
    source      text NOT NULL,
    options     jsonb NOT NULL DEFAULT '{}',
    started_at  timestamptz NOT NULL,
    finished_at timestamptz
);

-- One row for each row of a source: its balance, what of it was left out (sales that the ledger knew already), and the
-- transaction that brought it. A row that was refused or rolled back may come again: `attempt` is part of its command's key.
CREATE TABLE imported_rows (
    kind           text NOT NULL,
    row            text COLLATE "C" NOT NULL,
    attempt        integer NOT NULL DEFAULT 1 CHECK (attempt > 0),
    import_id      uuid NOT NULL REFERENCES imports,
    state          text NOT NULL CHECK (state IN ('imported', 'refused', 'rolled_back')),
    account_id     owner_id NOT NULL,
    balance        bigint NOT NULL,
    left_out       bigint NOT NULL DEFAULT 0,
    notes          jsonb NOT NULL DEFAULT '[]',
    transaction_id uuid,
    recorded_at    timestamptz NOT NULL,
    PRIMARY KEY (kind, row),
    CONSTRAINT an_imported_row_has_a_transaction CHECK (state = 'refused' OR transaction_id IS NOT NULL)
);
CREATE INDEX imported_rows_of_account ON imported_rows (account_id);

GRANT SELECT, INSERT, UPDATE ON imports, imported_rows TO credits_worker;

-- An imported line keeps the time and the word that it had in the old books; `type` has one of five words for every line.
CREATE OR REPLACE VIEW credit_transactions AS
    SELECT entry_id AS id, CASE WHEN account_id LIKE 'user:%' THEN substr(account_id, 6) END AS user_id, account_id,
           version, subscription_delta + purchased_delta AS amount,
           coalesce(cause ->> 'old_type', kind) AS transaction_type, balance_before, balance_after, cause, occurred_at,
           CASE WHEN cause ->> 'source' = 'import' THEN occurred_at ELSE recorded_at END AS created_at,
           recorded_at, kind,
           CASE WHEN kind = 'purchase' THEN 'purchase'
                WHEN kind IN ('subscription_grant', 'session_earning') THEN 'subscription'
                WHEN kind IN ('generation_capture', 'generation_debit', 'booking_debit') THEN 'usage'
                WHEN kind IN ('generation_refund', 'booking_reversal') THEN 'refund'
                ELSE kind END AS type,
           coalesce(cause ->> 'payment_intent_id', cause ->> 'checkout_session_id', cause ->> 'reference_id',
                    cause ->> 'invoice_id', cause ->> 'generation_id', cause ->> 'booking_id') AS reference_id
    FROM entries;

-- What was ever earned and spent, debt counted: as in the old books, earned less spent is the balance.
CREATE VIEW points_balances AS
    SELECT substr(a.account_id, 6) AS user_id, a.subscription + a.purchased - a.debt AS balance, m.lifetime_earned,
           m.lifetime_spent, a.updated_at
    FROM accounts a
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(c.change) FILTER (WHERE c.change > 0), 0)::bigint AS lifetime_earned,
               coalesce(-sum(c.change) FILTER (WHERE c.change < 0), 0)::bigint AS lifetime_spent
        FROM entries e
        CROSS JOIN LATERAL (SELECT e.subscription_delta + e.purchased_delta - e.debt_delta AS change) c
        WHERE e.account_id = a.account_id
    ) m
    WHERE a.account_id LIKE 'user:%' AND a.state <> 'merged';
GRANT SELECT ON points_balances TO credits_reader, credits_worker;

RESET ROLE;  -- the runner records this file as the login
