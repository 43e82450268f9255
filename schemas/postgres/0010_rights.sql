-- Nothing for PUBLIC: neither what was granted to it, nor what PostgreSQL gives it with every function and type.

-- The list of what was migrated belongs to the login that made it. Workers read it; whoever acts as the owner migrates on.
REVOKE ALL ON public.credits_migrations FROM PUBLIC;
GRANT SELECT ON public.credits_migrations TO credits_worker;
GRANT SELECT, INSERT ON public.credits_migrations TO credits_owner;

SET LOCAL ROLE credits_owner;
SET LOCAL search_path = credits;

REVOKE ALL ON ALL TABLES IN SCHEMA credits FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA credits FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA credits FROM PUBLIC;  -- a trigger calls its function whoever writes
REVOKE ALL ON DOMAIN external_id, owner_id, credits_held_or_owned FROM PUBLIC;
REVOKE ALL ON SCHEMA credits FROM PUBLIC;

-- What later migrations make is nobody's until they grant it. PostgreSQL's own gifts are given in every schema at once, so
-- they are taken back without naming one.
ALTER DEFAULT PRIVILEGES REVOKE ALL ON TABLES FROM PUBLIC, credits_worker, credits_reader;
ALTER DEFAULT PRIVILEGES REVOKE ALL ON SEQUENCES FROM PUBLIC, credits_worker, credits_reader;
ALTER DEFAULT PRIVILEGES REVOKE ALL ON FUNCTIONS FROM PUBLIC, credits_worker, credits_reader;
ALTER DEFAULT PRIVILEGES REVOKE ALL ON TYPES FROM PUBLIC, credits_worker, credits_reader;

-- Nothing writes customers any more: what Stripe says of one comes with its events.
REVOKE INSERT, UPDATE ON customers FROM credits_worker;

RESET ROLE;  -- the runner records this file as the login
