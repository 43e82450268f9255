-- What an audit found and nobody can repair, and who said that they know, and why. It stays visible, and alarms no more.
SET LOCAL ROLE credits_owner;
SET LOCAL search_path = credits;

-- A finding in full is its own name: where what is stored changes, it is another finding.
CREATE TABLE acknowledgements (
    finding     bytea PRIMARY KEY CHECK (length(finding) = 32),
    invariant   text NOT NULL,
    account_id  text COLLATE "C",
    subject     text NOT NULL,
    subject_id  text NOT NULL,
    field       text NOT NULL,
    stored      text,
    expected    text,
    operator    text NOT NULL CHECK (operator <> ''),
    reason      text NOT NULL CHECK (reason <> ''),
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
GRANT SELECT, INSERT ON acknowledgements TO credits_worker;

RESET ROLE;  -- the runner records this file as the login
