-- What Debezium needs of the database, once, by a superuser, after `credits migrate`; the server runs with wal_level = logical.
-- The password is read from a file, never from an argument.
\set ON_ERROR_STOP on
\set password `cat "${CREDITS_SECRETS:-/run/secrets}/database_debezium_password"`

-- It reads one table, and the log.
CREATE ROLE credits_debezium LOGIN REPLICATION PASSWORD :'password';
SELECT current_database() AS database \gset
GRANT CONNECT ON DATABASE :"database" TO credits_debezium;
GRANT USAGE ON SCHEMA credits TO credits_debezium;
GRANT SELECT ON credits.outbox TO credits_debezium;

-- Only what is added: that a row is removed later is nobody's news. Not dead letters: their bytes stand in a table of their own, and
-- the relay goes on to publish them.
CREATE PUBLICATION credits_outbox FOR TABLE credits.outbox WHERE (dead_letter_id IS NULL) WITH (publish = 'insert');

-- The slot is Debezium's to make, together with its first look at the table; never make it by hand (docs/deployment.md).
