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

RESET ROLE;  -- the runner records this file as the login
