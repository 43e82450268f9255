-- Lots in the order in which they are consumed (R3): a batch reads those that it may come to, however many there are.
SET LOCAL ROLE credits_owner;
SET LOCAL search_path = credits;

-- No column of it is changed by a spend, so that updates of lots stay HOT; like the index that it replaces, it loses a lot
-- when it is used up.
CREATE INDEX lots_open_in_order ON lots (account_id, pool, expires_at, granted_at, granted_version, position, lot_id)
    WHERE open;
DROP INDEX lots_open_of_account;

RESET ROLE;  -- the runner records this file as the login
