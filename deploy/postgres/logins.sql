-- The logins of a deployment, made once, by a superuser, in the database `credits`.
-- credits_migrator owns the database and makes the schema (`credits migrate`). credits_app is what workers and gateways log
-- in as: it may do what the role credits_worker may, and nothing else. Passwords are read from files, never from arguments.
\set ON_ERROR_STOP on
\set app_password `cat "${CREDITS_SECRETS:-/run/secrets}/database_app_password"`
\set owner_password `cat "${CREDITS_SECRETS:-/run/secrets}/database_owner_password"`

-- The roles that the first migration would make too, if its login might make roles; they belong to the whole cluster.
SELECT format('CREATE ROLE %I NOLOGIN', wanted) FROM unnest(ARRAY['credits_owner', 'credits_worker', 'credits_reader']) wanted
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) \gexec

CREATE ROLE credits_migrator LOGIN PASSWORD :'owner_password' IN ROLE credits_owner;
CREATE ROLE credits_app LOGIN PASSWORD :'app_password' IN ROLE credits_worker CONNECTION LIMIT 90;

SELECT current_database() AS database \gset
ALTER DATABASE :"database" OWNER TO credits_migrator;
REVOKE ALL ON DATABASE :"database" FROM PUBLIC;
GRANT CONNECT ON DATABASE :"database" TO credits_app;
