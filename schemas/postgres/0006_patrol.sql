-- Unusual patterns: what accounts did hour by hour, counted beside the spending path from what is recorded.
SET LOCAL ROLE credits_owner;
SET LOCAL search_path = credits;

-- No reference to accounts: its check would lock the account's row, and a spend would wait for the count.
CREATE TABLE activity (
    account_id owner_id NOT NULL,
    hour       timestamptz NOT NULL,
    spent      credits_held_or_owned NOT NULL,
    rejected   bigint NOT NULL CHECK (rejected >= 0),
    granted    bigint NOT NULL CHECK (granted >= 0),
    PRIMARY KEY (account_id, hour)
) WITH (fillfactor = 70);
CREATE INDEX activity_by_hour ON activity (hour);

-- Patterns that accounts show now: their beginning was told. What reached its threshold last long ago is forgotten.
CREATE TABLE unusual (
    account_id owner_id NOT NULL,
    code       text NOT NULL CHECK (code IN ('unusual_spending', 'rejection_burst', 'many_grants')),
    since      timestamptz NOT NULL,
    last_hour  timestamptz NOT NULL,
    PRIMARY KEY (account_id, code),
    CONSTRAINT since_comes_first CHECK (since <= last_hour)
);
CREATE INDEX unusual_by_last_hour ON unusual (last_hour);

-- One row: what was recorded until `read_until` is counted, and hours before `judged_from` are nobody's news. A ledger that
-- is at work already has a past: it is counted first.
CREATE TABLE patrol (
    single      boolean PRIMARY KEY DEFAULT true CHECK (single),
    read_until  timestamptz NOT NULL,
    judged_from timestamptz NOT NULL
);
INSERT INTO patrol (read_until, judged_from) VALUES (now() - interval '8 days', date_trunc('hour', now(), 'UTC'));

-- The patrol reads by time, a bounded number of rows at once. Holds, releases and applied commands are left out, so that
-- they pay nothing. Half a microsecond for each entry of eleven, where most are generations. BRIN would cost half of that and
-- lead to every page that no vacuum has summarised yet: to the whole journal, in a young one.
CREATE INDEX entries_of_balance_by_time ON entries (recorded_at) WHERE balance_before <> balance_after;
CREATE INDEX commands_rejected_by_time ON commands (recorded_at) WHERE reason IS NOT NULL;

GRANT SELECT, INSERT, UPDATE, DELETE ON activity, unusual TO credits_worker;
GRANT SELECT, UPDATE ON patrol TO credits_worker;

RESET ROLE;  -- the runner records this file as the login
