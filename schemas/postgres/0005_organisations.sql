-- Organisations: where what a hold releases goes after a change of mode, and how a person's share follows a merge (R15).
SET LOCAL ROLE credits_owner;
SET LOCAL search_path = credits;

-- The account that gets what a hold releases, where it is not the one that holds: between a change of mode and the end of
-- the holds that were open then. Few rows, for a while: both indexes are small, and a spend enters neither.
ALTER TABLE generations
    ADD COLUMN released_to owner_id,
    ADD CONSTRAINT only_a_hold_releases CHECK (released_to IS NULL OR state = 'held' AND released_to <> account_id);
CREATE INDEX generations_releasing ON generations (account_id) WHERE released_to IS NOT NULL AND state = 'held';
CREATE INDEX generations_by_release ON generations (released_to) WHERE released_to IS NOT NULL AND state = 'held';

-- A person who is merged leaves organisations' counters and open holds behind, under his own id. A hold is what has a
-- deadline: said so, no other index of holds can be taken for this one, whenever the plan is made.
CREATE INDEX generations_held_of_member ON generations (member_id) WHERE deadline_at IS NOT NULL AND member_id IS NOT NULL;
CREATE INDEX usage_days_of_member ON usage_days (member_id) WHERE member_id <> '';

-- A member's limit says for how long it is.
ALTER TABLE members ADD CONSTRAINT a_limit_has_a_period CHECK ((limit_credits IS NULL) = (period IS NULL));

-- What members may use, and have used in the running period of their limit: of the month where they have none.
CREATE VIEW organization_members AS
    SELECT m.organization_id, m.user_id, m.limit_credits, m.period, coalesce(u.used, 0)::bigint AS used_credits
    FROM members m
    LEFT JOIN accounts a ON a.account_id = 'org:' || m.organization_id
    CROSS JOIN LATERAL (SELECT (clock_timestamp() AT TIME ZONE coalesce(a.time_zone, 'UTC'))::date AS day) today
    LEFT JOIN LATERAL (
        SELECT sum(d.held + d.captured) AS used FROM usage_days d
        WHERE d.account_id = 'org:' || m.organization_id AND d.member_id = m.user_id
          AND d.day BETWEEN date_trunc(coalesce(m.period, 'month'), today.day::timestamp)::date AND today.day
    ) u ON true;
GRANT SELECT ON organization_members TO credits_reader, credits_worker;
GRANT DELETE ON usage_days TO credits_worker;

RESET ROLE;  -- the runner records this file as the login
