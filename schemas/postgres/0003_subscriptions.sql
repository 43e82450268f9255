-- What Stripe last said of a subscription, and as of when: its times have a resolution of a second, so the kind of event
-- and its id decide between events of one second. Months are planned in `allocations`.
SET LOCAL ROLE credits_owner;
SET LOCAL search_path = credits;

DROP INDEX subscriptions_by_allocation;
ALTER TABLE subscriptions
    DROP COLUMN allocation_next_at, DROP COLUMN tier,
    ADD COLUMN event_rank smallint NOT NULL DEFAULT 0,
    ADD COLUMN event_id text COLLATE "C" NOT NULL DEFAULT '';

-- A change of plan within a period: the credits that it raises the period to, whether the period is known yet or not.
ALTER TABLE purchases ADD COLUMN worth bigint CHECK (worth >= 0);

-- What an event of Stripe's left out, as it was when it was fetched: further lines, or the object of a thin event.
CREATE TABLE stripe_objects (
    path       text COLLATE "C" PRIMARY KEY,
    body       jsonb NOT NULL,
    fetched_at timestamptz NOT NULL
);
CREATE INDEX parked_lacking ON parked (waits_for) WHERE provider = 'stripe_api';
GRANT SELECT, INSERT ON stripe_objects TO credits_worker;

RESET ROLE;  -- the runner records this file as the login
