-- The ledger: accounts, lots, entries, the worker's memory, and what leaves it.
--
-- Conventions. Amounts are whole credits (bigint, R-rules of the product: no fractions anywhere). Times are
-- timestamptz. Closed sets are CHECK constraints, not enum types, so that a later migration can add a value
-- without a rewrite. Ids are text in collation "C": opaque bytes, compared as bytes. Rows that every spend
-- updates carry no index on a column that a spend changes, so that their updates stay HOT.

-- Roles: credits_owner owns the tables, credits_worker applies events, credits_reader reads the views. None
-- can log in: a deployment grants them to its own login roles. They belong to the whole cluster, so a second
-- database finds them already made, and then a login that may not make roles can migrate too.
DO $$
DECLARE wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['credits_owner', 'credits_worker', 'credits_reader'] LOOP
        CONTINUE WHEN EXISTS (SELECT FROM pg_roles WHERE rolname = wanted);
        BEGIN
            EXECUTE format('CREATE ROLE %I NOLOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE', wanted);
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL;  -- another database of this cluster, or another migration at this moment, made it
        END;
    END LOOP;
END $$;

DO $$
BEGIN
    EXECUTE format('GRANT credits_owner, credits_worker, credits_reader TO %I', current_user);
EXCEPTION WHEN OTHERS THEN
    RAISE NOTICE 'roles were not granted to %: %', current_user, SQLERRM;
END $$;

-- Everything below belongs to credits_owner, so that the login which happened to migrate owns nothing.
CREATE SCHEMA credits AUTHORIZATION credits_owner;
SET LOCAL ROLE credits_owner;
SET LOCAL search_path = credits;

-- An id as the contract defines it: 1–255 printable ASCII characters without spaces.
-- The length stands apart from the pattern: a bounded repetition costs PostgreSQL's regular expressions twenty
-- microseconds and more for each value, which was most of the database's work.
CREATE DOMAIN external_id AS text COLLATE "C"
    CHECK (VALUE ~ '^[!-~]+$' AND octet_length(VALUE) <= 255);
CREATE DOMAIN owner_id AS text COLLATE "C"
    CHECK (VALUE ~ '^(user|org):[!-~]+$' AND octet_length(VALUE) <= position(':' IN VALUE) + 255);
CREATE DOMAIN credits_held_or_owned AS bigint CHECK (VALUE >= 0);

-- One row per owner (R1). The totals are a cache of the owner's lots, provable from the entries (R2).
CREATE TABLE accounts (
    account_id     owner_id PRIMARY KEY,
    subscription   credits_held_or_owned NOT NULL DEFAULT 0,
    purchased      credits_held_or_owned NOT NULL DEFAULT 0,
    held           credits_held_or_owned NOT NULL DEFAULT 0,
    debt           credits_held_or_owned NOT NULL DEFAULT 0,
    version        bigint NOT NULL DEFAULT 0 CHECK (version >= 0),
    chain_hash     bytea  NOT NULL DEFAULT ''::bytea,
    tier           text   NOT NULL DEFAULT 'free',
    time_zone      text,
    state          text   NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'closed', 'merged')),
    merged_into    owner_id,
    registered_at  timestamptz,
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT held_is_owned CHECK (held <= subscription + purchased),
    CONSTRAINT debt_takes_unheld_credits_first CHECK (debt = 0 OR held = subscription + purchased),
    CONSTRAINT merged_names_its_heir CHECK ((state = 'merged') = (merged_into IS NOT NULL)),
    CONSTRAINT heir_is_another CHECK (merged_into <> account_id)
) WITH (fillfactor = 70);

-- One row per grant (R2). `open` turns false once, when the lot is used up: an index may depend on it
-- without costing every spend its HOT update, which a predicate on `remaining` would.
CREATE TABLE lots (
    lot_id           uuid PRIMARY KEY,
    account_id       owner_id NOT NULL REFERENCES accounts,
    pool             text NOT NULL CHECK (pool IN ('subscription', 'purchased')),
    granted          bigint NOT NULL CHECK (granted > 0),
    remaining        credits_held_or_owned NOT NULL,
    held             credits_held_or_owned NOT NULL DEFAULT 0,
    expired          credits_held_or_owned NOT NULL DEFAULT 0,
    clawed           credits_held_or_owned NOT NULL DEFAULT 0,
    open             boolean NOT NULL DEFAULT true,
    expires_at       timestamptz,
    source_kind      text NOT NULL,
    source_reference text NOT NULL,
    subscription_id  text COLLATE "C",
    period_start     timestamptz,
    granted_version  bigint NOT NULL,
    granted_at       timestamptz NOT NULL,
    CONSTRAINT held_remains CHECK (held <= remaining),
    CONSTRAINT remainder_was_granted CHECK (remaining + expired + clawed <= granted),
    CONSTRAINT open_until_used_up CHECK (open = (remaining > 0))
) WITH (fillfactor = 70);
CREATE INDEX lots_open_of_account ON lots (account_id) WHERE open;
CREATE INDEX lots_open_by_expiry ON lots (expires_at) WHERE open AND expires_at IS NOT NULL;

-- One row per account version (R9): what changed, what was before and after, why, and the proof.
CREATE TABLE entries (
    account_id         owner_id NOT NULL,
    version            bigint NOT NULL CHECK (version > 0),
    entry_id           uuid NOT NULL,
    transaction_id     uuid NOT NULL,
    kind               text NOT NULL CHECK (kind IN (
        'signup_grant', 'subscription_grant', 'session_earning', 'purchase', 'promotion',
        'generation_hold', 'generation_capture', 'generation_release', 'generation_debit', 'generation_refund',
        'booking_debit', 'booking_reversal', 'expiry', 'clawback', 'clawback_reversal', 'debt_payment',
        'adjustment', 'transfer', 'merge', 'import')),
    subscription_delta bigint NOT NULL,
    purchased_delta    bigint NOT NULL,
    held_delta         bigint NOT NULL,
    debt_delta         bigint NOT NULL,
    balance_before     credits_held_or_owned NOT NULL,
    balance_after      credits_held_or_owned NOT NULL,
    subscription_after credits_held_or_owned NOT NULL,
    purchased_after    credits_held_or_owned NOT NULL,
    held_after         credits_held_or_owned NOT NULL,
    debt_after         credits_held_or_owned NOT NULL,
    allocation         jsonb NOT NULL,
    member_id          text COLLATE "C",
    cause              jsonb NOT NULL,
    topic              text,
    partition          integer,
    kafka_offset       bigint,
    trace_id           text,
    catalogue_version  text,
    occurred_at        timestamptz NOT NULL,
    recorded_at        timestamptz NOT NULL,
    previous_hash      bytea NOT NULL,
    hash               bytea NOT NULL CHECK (length(hash) = 32),
    PRIMARY KEY (account_id, version),
    CONSTRAINT before_and_after_add_up
        CHECK (balance_after = balance_before + subscription_delta + purchased_delta),
    CONSTRAINT pools_are_the_balance CHECK (balance_after = subscription_after + purchased_after),
    CONSTRAINT held_is_owned CHECK (held_after <= balance_after),
    CONSTRAINT first_entry_starts_the_chain CHECK (version > 1 OR (balance_before = 0 AND previous_hash = ''::bytea))
);

CREATE FUNCTION refuse_change_of_the_journal() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'entries are append-only: % is refused; correct a mistake with a compensating entry', TG_OP
        USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER entries_are_append_only BEFORE UPDATE OR DELETE ON entries
    FOR EACH ROW EXECUTE FUNCTION refuse_change_of_the_journal();
CREATE TRIGGER entries_are_never_truncated BEFORE TRUNCATE ON entries
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change_of_the_journal();
-- ALWAYS: a plain trigger would be silent under session_replication_role = replica.
ALTER TABLE entries ENABLE ALWAYS TRIGGER entries_are_append_only;
ALTER TABLE entries ENABLE ALWAYS TRIGGER entries_are_never_truncated;

-- The worker's memory (R8): one row per command decided, kept for ever. Idempotency is decided here.
CREATE TABLE commands (
    scope          text COLLATE "C" NOT NULL,
    type           text COLLATE "C" NOT NULL,
    key            text COLLATE "C" NOT NULL,
    fingerprint    bytea NOT NULL,
    outcome        text NOT NULL CHECK (outcome IN ('applied', 'rejected', 'duplicate')),
    reason         text,
    account_id     owner_id,
    required       bigint,
    available      bigint,
    transaction_id uuid NOT NULL,
    recorded_at    timestamptz NOT NULL,
    PRIMARY KEY (key, type, scope),
    CONSTRAINT only_a_rejection_has_a_reason CHECK ((outcome = 'rejected') = (reason IS NOT NULL)),
    CONSTRAINT reason_is_of_the_contract CHECK (reason IN (
        'insufficient_credits', 'daily_limit', 'member_limit', 'no_subscription', 'unknown_price', 'unknown_hold',
        'hold_closed', 'unknown_booking', 'booking_closed', 'same_account', 'not_a_member', 'account_closed',
        'invalid_amount'))
);

-- One row per generation; while its state is `held` it is also the reservation (R5). Its id is the business key.
CREATE TABLE generations (
    generation_id   external_id PRIMARY KEY,
    account_id      owner_id,
    member_id       text COLLATE "C",
    state           text NOT NULL CHECK (state IN ('held', 'completed', 'failed', 'cancelled', 'lapsed')),
    kind            text,
    model           text,
    units           bigint,
    held            credits_held_or_owned NOT NULL DEFAULT 0,
    hold_allocation jsonb NOT NULL DEFAULT '[]',
    deadline_at     timestamptz,
    taken           credits_held_or_owned NOT NULL DEFAULT 0,
    given_back      credits_held_or_owned NOT NULL DEFAULT 0,
    counted_on      date,
    recorded_at     timestamptz NOT NULL,
    CONSTRAINT a_hold_has_credits_and_deadline
        CHECK ((state = 'held') = (deadline_at IS NOT NULL) AND (state = 'held') = (held > 0)
               AND (state <> 'held' OR account_id IS NOT NULL)),
    CONSTRAINT at_most_what_was_taken_comes_back CHECK (given_back <= taken)
) WITH (fillfactor = 70);
CREATE INDEX generations_held_by_deadline ON generations (deadline_at) WHERE state = 'held';

CREATE TABLE bookings (
    booking_id           external_id PRIMARY KEY,
    client_account       owner_id,
    practitioner_account owner_id,
    state                text NOT NULL CHECK (state IN ('booked', 'closed')),
    credits              credits_held_or_owned NOT NULL DEFAULT 0,
    given_back           credits_held_or_owned NOT NULL DEFAULT 0,
    earning_lot          uuid,
    recorded_at          timestamptz NOT NULL,
    CONSTRAINT at_most_the_price_comes_back CHECK (given_back <= credits),
    CONSTRAINT two_parties CHECK (client_account <> practitioner_account)
) WITH (fillfactor = 70);

-- One row per thing bought or earned once (R8b): all events about one purchase share its key.
-- Keys: checkout:<session>, period:<subscription>:<plan>:<start>, allocation:<subscription>:<start>:<n>, signup:<owner>.
CREATE TABLE purchases (
    purchase_key      text COLLATE "C" PRIMARY KEY,
    account_id        owner_id NOT NULL,
    kind              text NOT NULL,
    lot_id            uuid,
    credits           credits_held_or_owned NOT NULL,
    subscription_id   text COLLATE "C",
    plan              text,
    period_start      timestamptz,
    period_end        timestamptz,
    invoice_id        text COLLATE "C",
    payment_id        text COLLATE "C",
    paid              bigint CHECK (paid >= 0),
    catalogue_version text,
    transaction_id    uuid NOT NULL,
    recorded_at       timestamptz NOT NULL
);
CREATE INDEX purchases_of_account ON purchases (account_id);
CREATE INDEX purchases_of_subscription ON purchases (subscription_id) WHERE subscription_id IS NOT NULL;
CREATE INDEX purchases_of_payment ON purchases (payment_id) WHERE payment_id IS NOT NULL;
CREATE INDEX purchases_of_invoice ON purchases (invoice_id) WHERE invoice_id IS NOT NULL;

-- What Stripe took and gave back, for each payment (R7). `clawed` follows its target up and down.
CREATE TABLE payments (
    payment_id     text COLLATE "C" PRIMARY KEY,
    invoice_id     text COLLATE "C",
    charge_id      text COLLATE "C",
    account_id     owner_id,
    paid           bigint CHECK (paid >= 0),
    currency       text,
    refunded_total bigint NOT NULL DEFAULT 0 CHECK (refunded_total >= 0),
    clawed         credits_held_or_owned NOT NULL DEFAULT 0,
    recorded_at    timestamptz NOT NULL
);
CREATE INDEX payments_of_invoice ON payments (invoice_id) WHERE invoice_id IS NOT NULL;
CREATE INDEX payments_of_charge ON payments (charge_id) WHERE charge_id IS NOT NULL;

CREATE TABLE refunds (
    refund_id   text COLLATE "C" PRIMARY KEY,
    payment_id  text COLLATE "C" NOT NULL,
    amount      bigint NOT NULL CHECK (amount >= 0),
    status      text NOT NULL,
    event_at    timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL
);
CREATE INDEX refunds_of_payment ON refunds (payment_id);

CREATE TABLE disputes (
    dispute_id  text COLLATE "C" PRIMARY KEY,
    payment_id  text COLLATE "C" NOT NULL,
    amount      bigint NOT NULL CHECK (amount >= 0),
    status      text NOT NULL,
    withdrawn   boolean NOT NULL DEFAULT false,
    event_at    timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL
);
CREATE INDEX disputes_of_payment ON disputes (payment_id);

CREATE TABLE subscriptions (
    subscription_id  text COLLATE "C" PRIMARY KEY,
    account_id       owner_id,
    customer_id      text COLLATE "C",
    plan             text,
    tier             text,
    status           text NOT NULL,
    period_start     timestamptz,
    period_end       timestamptz,
    cancel_at        timestamptz,
    allocation_next_at timestamptz,
    metadata         jsonb NOT NULL DEFAULT '{}',
    event_at         timestamptz NOT NULL,
    recorded_at      timestamptz NOT NULL
);
CREATE INDEX subscriptions_of_account ON subscriptions (account_id);
CREATE INDEX subscriptions_by_allocation ON subscriptions (allocation_next_at) WHERE allocation_next_at IS NOT NULL;

CREATE TABLE customers (
    customer_id text COLLATE "C" PRIMARY KEY,
    metadata    jsonb NOT NULL DEFAULT '{}',
    event_at    timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL
);

-- The mapping table of R13. A merge points the source's ids at the account that inherits.
CREATE TABLE identities (
    external_id text COLLATE "C" NOT NULL,
    provider    text COLLATE "C" NOT NULL,
    owner       owner_id NOT NULL,
    resolved_by text NOT NULL,
    recorded_at timestamptz NOT NULL,
    PRIMARY KEY (external_id, provider)
);
CREATE INDEX identities_of_owner ON identities (owner);

CREATE TABLE organisations (
    organization_id external_id PRIMARY KEY,
    mode            text NOT NULL CHECK (mode IN ('mirror', 'shared')),
    event_at        timestamptz NOT NULL,
    recorded_at     timestamptz NOT NULL
);

CREATE TABLE members (
    organization_id external_id NOT NULL REFERENCES organisations,
    user_id         external_id NOT NULL,
    limit_credits   credits_held_or_owned,
    period          text CHECK (period IN ('day', 'week', 'month')),
    PRIMARY KEY (organization_id, user_id)
);
CREATE INDEX members_of_user ON members (user_id);

-- Counters of an account's own day (R14) and of a member's share of an organisation (R15; '' = the account itself).
CREATE TABLE usage_days (
    account_id  owner_id NOT NULL,
    member_id   text COLLATE "C" NOT NULL DEFAULT '',
    day         date NOT NULL,
    generations bigint NOT NULL DEFAULT 0 CHECK (generations >= 0),
    held        credits_held_or_owned NOT NULL DEFAULT 0,
    captured    credits_held_or_owned NOT NULL DEFAULT 0,
    PRIMARY KEY (account_id, member_id, day)
) WITH (fillfactor = 70);

-- Messages that could not be applied (R11), as they came: bytes, because the text may be what is wrong with them.
CREATE TABLE dead_letters (
    dead_letter_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic          text NOT NULL,
    partition      integer NOT NULL,
    kafka_offset   bigint NOT NULL,
    record_hash    bytea NOT NULL,
    record_at      timestamptz,
    key            bytea,
    value          bytea,
    headers        jsonb NOT NULL,
    reason         text NOT NULL CHECK (reason IN (
        'malformed', 'unsupported_version', 'bad_signature', 'thin_event', 'idempotency_conflict', 'unresolved',
        'too_large', 'type_not_allowed', 'database_rejected')),
    detail         text NOT NULL,
    source         text,
    type           text,
    command_key    text,
    state          text NOT NULL DEFAULT 'dead' CHECK (state IN ('dead', 'replaying', 'replayed', 'discarded')),
    attempts       integer NOT NULL DEFAULT 1 CHECK (attempts > 0),
    recorded_at    timestamptz NOT NULL,
    settled_at     timestamptz,
    settled_reason text,
    -- The hash too: a topic that was made anew counts its offsets from zero again.
    UNIQUE (topic, partition, kafka_offset, record_hash)
);
CREATE INDEX dead_letters_by_state ON dead_letters (state, reason);
CREATE INDEX dead_letters_by_command ON dead_letters (command_key) WHERE command_key IS NOT NULL;

-- What will be published (R10). The first five columns are those of Debezium's outbox event router; `sequence`
-- follows commit order for each account, because its rows are inserted while the account's row is locked. A dead
-- letter's row names it instead of repeating its bytes.
CREATE TABLE outbox (
    id             uuid NOT NULL,
    aggregatetype  text NOT NULL,
    aggregateid    text NOT NULL,
    type           text NOT NULL,
    payload        bytea NOT NULL,
    headers        jsonb NOT NULL,
    shard          smallint NOT NULL,
    dead_letter_id bigint REFERENCES dead_letters,
    sequence       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000, autovacuum_vacuum_cost_delay = 0);

-- Messages that wait for something they need (R11), and dead letters on their way back in.
CREATE TABLE parked (
    parked_id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic           text NOT NULL,
    partition       integer NOT NULL,
    kafka_offset    bigint NOT NULL,
    record_hash     bytea NOT NULL,
    record_at       timestamptz,
    key             bytea,
    value           bytea,
    headers         jsonb NOT NULL,
    waits_for       text COLLATE "C",
    provider        text COLLATE "C",
    detail          text NOT NULL,
    source          text,
    type            text,
    command_key     text,
    dead_letter_id  bigint UNIQUE REFERENCES dead_letters,
    attempts        integer NOT NULL DEFAULT 1,
    parked_at       timestamptz NOT NULL,
    next_attempt_at timestamptz NOT NULL,
    deadline_at     timestamptz NOT NULL,
    UNIQUE (topic, partition, kafka_offset, record_hash)
);
CREATE INDEX parked_by_next_attempt ON parked (next_attempt_at);
CREATE INDEX parked_by_command ON parked (command_key) WHERE command_key IS NOT NULL;

-- Which workers live, and what they consume: readiness is judged from here, by any process.
CREATE TABLE heartbeats (
    worker_id  uuid PRIMARY KEY,
    pid        integer NOT NULL,
    topics     text[] NOT NULL,
    beat_at    timestamptz NOT NULL,
    started_at timestamptz NOT NULL
);

-- Readers' contract: views, in the shape that readers of the old systems know.
CREATE VIEW user_credits AS
    SELECT substr(account_id, 6) AS user_id, subscription AS subscription_credits, purchased AS purchased_credits,
           subscription + purchased AS balance, held, subscription + purchased - held AS available, debt, tier,
           version, updated_at
    FROM accounts WHERE account_id LIKE 'user:%' AND state <> 'merged';

CREATE VIEW credit_transactions AS
    SELECT entry_id AS id, CASE WHEN account_id LIKE 'user:%' THEN substr(account_id, 6) END AS user_id, account_id,
           version, subscription_delta + purchased_delta AS amount, kind AS transaction_type, balance_before,
           balance_after, cause, occurred_at, recorded_at AS created_at
    FROM entries;

CREATE VIEW organization_balances AS
    SELECT o.organization_id, o.mode, a.account_id, a.subscription + a.purchased AS balance, a.subscription,
           a.purchased, a.held, a.subscription + a.purchased - a.held AS available, a.debt, a.version
    FROM organisations o
    LEFT JOIN LATERAL (SELECT m.user_id FROM members m WHERE m.organization_id = o.organization_id
                       ORDER BY m.user_id LIMIT 1) sole ON o.mode = 'mirror'
    JOIN accounts a ON a.account_id = CASE o.mode WHEN 'shared' THEN 'org:' || o.organization_id
                                                  ELSE 'user:' || sole.user_id END;

CREATE VIEW holds AS
    SELECT generation_id, account_id, member_id, kind, model, units, held AS credits, hold_allocation AS allocation,
           deadline_at, recorded_at
    FROM generations WHERE state = 'held';

-- Privileges: the worker may add entries and commands, never change them; the reader sees views only.
GRANT USAGE ON SCHEMA credits TO credits_worker, credits_reader;
GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA credits TO credits_worker;
GRANT UPDATE ON accounts, lots, generations, bookings, purchases, payments, refunds, disputes, subscriptions, customers,
                identities, organisations, members, usage_days, dead_letters, parked, heartbeats TO credits_worker;
GRANT DELETE ON outbox, parked, members, heartbeats TO credits_worker;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA credits TO credits_worker;
REVOKE INSERT ON user_credits, credit_transactions, organization_balances, holds FROM credits_worker;
GRANT SELECT ON user_credits, credit_transactions, organization_balances, holds TO credits_reader;

RESET ROLE;  -- the runner records this file as the login
