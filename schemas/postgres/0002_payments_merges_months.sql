-- What clawback, merges and monthly allocation need to remember.
SET LOCAL ROLE credits_owner;
SET LOCAL search_path = credits;

-- `allocate_at` is when the next month of a yearly period falls due for the account: whoever locks the account then knows
-- that there are months to load. It changes once a month, so its index costs a spend nothing.
ALTER TABLE accounts
    ADD COLUMN allocate_at timestamptz,
    ADD COLUMN signup_granted boolean NOT NULL DEFAULT false;
UPDATE accounts a SET signup_granted = true
WHERE EXISTS (SELECT FROM purchases p WHERE p.purchase_key = 'signup:' || a.account_id);
CREATE INDEX accounts_by_allocation ON accounts (allocate_at) WHERE allocate_at IS NOT NULL;

-- A merge brings several lots in by one version; their order among each other stays as it was.
ALTER TABLE lots ADD COLUMN position integer NOT NULL DEFAULT 0;

-- What was clawed back of a purchase, and from where, the latest last: it is undone in reverse order (R7).
ALTER TABLE purchases
    ADD COLUMN month smallint CHECK (month BETWEEN 0 AND 11),
    ADD COLUMN clawed credits_held_or_owned NOT NULL DEFAULT 0,
    ADD COLUMN clawed_parts jsonb NOT NULL DEFAULT '[]',
    ADD CONSTRAINT at_most_what_was_bought_is_clawed CHECK (clawed <= credits);

-- The months to come of yearly periods that were paid for (R14). Keys of what they grant: allocation:<subscription>:<start>:<n>.
CREATE TABLE allocations (
    allocation_key  text COLLATE "C" PRIMARY KEY,
    subscription_id text COLLATE "C" NOT NULL,
    anchor_at       timestamptz NOT NULL,
    period_end      timestamptz NOT NULL,
    account_id      owner_id NOT NULL REFERENCES accounts,
    plan            text NOT NULL,
    credits         bigint NOT NULL CHECK (credits > 0),
    next_month      smallint NOT NULL CHECK (next_month BETWEEN 1 AND 12),
    next_at         timestamptz,
    invoice_id      text COLLATE "C",
    payment_id      text COLLATE "C",
    paid            bigint CHECK (paid >= 0),
    returned        bigint NOT NULL DEFAULT 0 CHECK (returned >= 0),
    CONSTRAINT a_month_begins_inside_the_period CHECK (next_at > anchor_at AND next_at < period_end)
);
CREATE INDEX allocations_of_subscription ON allocations (subscription_id);
CREATE INDEX allocations_of_account ON allocations (account_id);
CREATE INDEX allocations_of_invoice ON allocations (invoice_id) WHERE invoice_id IS NOT NULL;
CREATE INDEX allocations_of_payment ON allocations (payment_id) WHERE payment_id IS NOT NULL;

-- A payment's row is its lock: everything that speaks of the same money waits there for its turn. Invoices have a row of
-- their own, for the same reason. What went back is told by refunds and disputes; their words only ever add up.
ALTER TABLE payments
    DROP COLUMN account_id, DROP COLUMN paid, DROP COLUMN currency, DROP COLUMN clawed;
ALTER TABLE payments RENAME COLUMN refunded_total TO refunded;
ALTER TABLE payments RENAME CONSTRAINT payments_refunded_total_check TO payments_refunded_check;
ALTER TABLE refunds
    DROP CONSTRAINT refunds_pkey, DROP COLUMN event_at, ADD PRIMARY KEY (payment_id, refund_id),
    ADD CONSTRAINT refund_status_is_known CHECK (status IN ('pending', 'succeeded', 'failed'));
DROP INDEX refunds_of_payment;
ALTER TABLE disputes
    DROP CONSTRAINT disputes_pkey, DROP COLUMN event_at, DROP COLUMN status, DROP COLUMN withdrawn,
    ADD COLUMN steps text[] NOT NULL DEFAULT '{}', ADD PRIMARY KEY (payment_id, dispute_id),
    ADD CONSTRAINT dispute_steps_are_known
        CHECK (steps <@ ARRAY['inquiry', 'opened', 'withdrawn', 'reinstated', 'won', 'lost']);
DROP INDEX disputes_of_payment;

GRANT SELECT, INSERT, UPDATE ON allocations TO credits_worker;

RESET ROLE;  -- the runner records this file as the login
