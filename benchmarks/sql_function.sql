-- One event, one call: what a team would write that keeps its rules in the database. The tables, triggers, entries, hash
-- chain and outbox rows are the product's. It knows holds, captures, releases and bookings of plain accounts; whatever
-- else it meets it answers with NULL, before it has written anything, and the caller takes the product's path.
CREATE SCHEMA bench;
GRANT USAGE ON SCHEMA bench TO credits_worker;

-- The catalogue's prices of one unit; model '' is every other model.
CREATE TABLE bench.prices (kind text, model text, credits bigint NOT NULL, PRIMARY KEY (kind, model));
GRANT SELECT ON bench.prices TO credits_worker;

-- What is the same whatever the event asks for. `cause` is JSON with sorted keys, `occurred` the time as the chain has it.
CREATE TYPE bench.event AS (
    scope text, type text, key text, fingerprint bytea, cause text, topic text, partition integer, kafka_offset bigint,
    trace_id text, occurred_at timestamptz, occurred text, catalogue text, low_balance bigint, unlimited_tiers text[],
    balance_max bigint);

CREATE FUNCTION bench.price(k text, m text) RETURNS bigint STABLE LANGUAGE sql
    RETURN (SELECT p.credits FROM bench.prices p WHERE p.kind = k AND p.model IN (m, '') ORDER BY p.model DESC LIMIT 1);

-- As Python's isoformat: no fraction where there is none.
CREATE FUNCTION bench.iso(moment timestamptz) RETURNS text STABLE LANGUAGE sql
    RETURN to_char(moment AT TIME ZONE 'UTC',
                   CASE WHEN extract(microseconds FROM moment)::bigint % 1000000 = 0 THEN 'YYYY-MM-DD"T"HH24:MI:SS'
                        ELSE 'YYYY-MM-DD"T"HH24:MI:SS.US' END);

-- The account's next version: entry, totals, message. `moves` and `chain` are the touched lots as JSON and as the chain
-- has them.
CREATE FUNCTION bench.journal(
    event bench.event, a credits.accounts, entry_kind text, subscription bigint, purchased bigint, held bigint,
    moves text, chain text, tx uuid, decided_at timestamptz
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    entry uuid := uuidv7();
    moment timestamptz := CASE WHEN a.version > 0 THEN greatest(decided_at, a.updated_at) ELSE decided_at END;
    recorded text := bench.iso(moment);
    before bigint := a.subscription + a.purchased;
    after bigint := before + subscription + purchased;
    link bytea := sha256(a.chain_hash || convert_to(concat(
        a.account_id, ' ', a.version + 1, ' ', entry, ' ', tx, ' ', entry_kind, E'\n',
        subscription, ' ', purchased, ' ', held, ' 0', E'\n',
        before, ' ', after, ' ', a.subscription + subscription, ' ', a.purchased + purchased, E'\n',
        a.held + held, ' ', a.debt, ' ', E'\n',
        event.topic, ' ', event.partition, ' ', event.kafka_offset, ' ', event.trace_id, ' ', event.catalogue, E'\n',
        event.occurred, ' ', recorded, '+00:00', E'\n',
        chain, E'\n', event.cause), 'UTF8'));
BEGIN
    INSERT INTO credits.entries (
        account_id, version, entry_id, transaction_id, kind, subscription_delta, purchased_delta, held_delta, debt_delta,
        balance_before, balance_after, subscription_after, purchased_after, held_after, debt_after, allocation, cause,
        topic, partition, kafka_offset, trace_id, catalogue_version, occurred_at, recorded_at, previous_hash, hash)
    VALUES (
        a.account_id, a.version + 1, entry, tx, entry_kind, subscription, purchased, held, 0,
        before, after, a.subscription + subscription, a.purchased + purchased, a.held + held, a.debt,
        ('[' || moves || ']')::jsonb, event.cause::jsonb,
        event.topic, event.partition, event.kafka_offset, event.trace_id, event.catalogue, event.occurred_at, moment,
        a.chain_hash, link);
    UPDATE credits.accounts x
    SET subscription = a.subscription + journal.subscription, purchased = a.purchased + journal.purchased,
        held = a.held + journal.held, version = a.version + 1, chain_hash = link, updated_at = moment
    WHERE x.account_id = a.account_id;
    INSERT INTO credits.outbox (id, aggregatetype, aggregateid, type, payload, headers, shard)
    VALUES (
        entry, 'credit.changed', a.account_id, 'credit.changed',
        convert_to(json_build_object(
            'account_id', a.account_id, 'version', a.version + 1, 'kind', entry_kind, 'amount', subscription + purchased,
            'balance', json_build_object(
                'before', before, 'after', after, 'subscription', a.subscription + subscription,
                'purchased', a.purchased + purchased, 'held', a.held + held, 'available', after - a.held - held,
                'debt', a.debt),
            'member_id', NULL,
            'breakdown', json_build_object(
                'subscription', subscription, 'purchased', purchased, 'lots', ('[' || moves || ']')::json),
            'cause', event.cause::json, 'occurred_at', replace(event.occurred, '+00:00', 'Z'),
            'recorded_at', recorded || 'Z')::text, 'UTF8'),
        CASE WHEN event.trace_id IS NULL THEN jsonb_build_object('ce_time', recorded || 'Z')
             ELSE jsonb_build_object('ce_time', recorded || 'Z', 'traceparent',
                  concat('00-', event.trace_id, '-', right(replace(entry::text, '-', ''), 16), '-01')) END,
        crc32(convert_to(a.account_id, 'UTF8')) % 16);
END $$;

-- `action` is hold, capture, failed, cancelled or book; `object` the generation or booking; `other` the practitioner.
-- Returns how many messages the event left in the outbox.
CREATE FUNCTION bench.apply(
    event bench.event, action text, account text, other text, object text, kind text, model text, units bigint,
    claimed bigint, hold_seconds bigint, external_ids text[]
) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    known bytea;
    a credits.accounts;
    b credits.accounts;
    swapped credits.accounts;
    g credits.generations;
    one record;
    decided_at timestamptz;
    tx uuid := uuidv7();
    price bigint;
    missing bigint;
    part bigint;
    of_pool text;
    earned uuid;
    subscription bigint := 0;
    purchased bigint := 0;
    held bigint := 0;
    moves text := '';
    chain text := '';
    pins text := '';
BEGIN
    -- Before the lock, so that a repeat waits for nobody; and after it, because another may have decided meanwhile.
    SELECT c.fingerprint INTO known FROM credits.commands c
    WHERE c.key = event.key AND c.type = event.type AND c.scope = event.scope;
    IF FOUND THEN
        RETURN CASE WHEN known = event.fingerprint THEN 0 END;
    END IF;
    IF EXISTS (SELECT FROM credits.identities i WHERE i.external_id = ANY (external_ids)) THEN
        RETURN NULL;
    END IF;
    SELECT * INTO a FROM credits.accounts x WHERE x.account_id = least(account, other) FOR UPDATE;
    IF other IS NOT NULL THEN
        SELECT * INTO b FROM credits.accounts x WHERE x.account_id = greatest(account, other) FOR UPDATE;
        IF a.account_id <> account THEN
            swapped := a;
            a := b;
            b := swapped;
        END IF;
    END IF;
    SELECT c.fingerprint INTO known FROM credits.commands c
    WHERE c.key = event.key AND c.type = event.type AND c.scope = event.scope;
    IF FOUND THEN
        RETURN CASE WHEN known = event.fingerprint THEN 0 END;
    END IF;
    decided_at := clock_timestamp();

    -- Whatever is not plain: an account that is new, closed, indebted or limited, and what time has yet to do.
    IF a.account_id IS NULL OR a.state <> 'open' OR a.debt <> 0 OR a.allocate_at <= decided_at
       OR a.tier <> ALL (event.unlimited_tiers)
       OR other IS NOT NULL AND (b.account_id IS NULL OR b.state <> 'open' OR b.debt <> 0
                                 OR b.allocate_at <= decided_at OR a.account_id = b.account_id)
       OR EXISTS (SELECT FROM credits.lots l
                  WHERE l.open AND l.expires_at <= decided_at AND l.account_id IN (account, other))
       OR EXISTS (SELECT FROM credits.generations h
                  WHERE h.state = 'held' AND h.deadline_at <= decided_at AND h.account_id IN (account, other))
    THEN
        RETURN NULL;
    END IF;

    IF action IN ('hold', 'book') THEN
        IF action = 'hold' THEN
            IF EXISTS (SELECT FROM credits.generations x WHERE x.generation_id = object) THEN
                RETURN NULL;
            END IF;
            price := coalesce(bench.price(kind, model) * units, claimed);
        ELSE
            IF EXISTS (SELECT FROM credits.bookings x WHERE x.booking_id = object) THEN
                RETURN NULL;
            END IF;
            price := claimed;
        END IF;
        missing := a.subscription + a.purchased - a.held - price;  -- what will be available
        IF price IS NULL OR price > event.balance_max OR missing < 0
           OR missing < event.low_balance AND missing + price >= event.low_balance
           OR b.subscription + b.purchased + price > event.balance_max
        THEN
            RETURN NULL;
        END IF;
        missing := price;
        FOR one IN
            SELECT l.lot_id, l.pool, l.remaining - l.held AS unheld FROM credits.lots l
            WHERE l.account_id = account AND l.open AND l.remaining > l.held
            ORDER BY l.pool = 'purchased', l.expires_at NULLS LAST, l.granted_at, l.granted_version, l.position, l.lot_id
        LOOP
            part := least(missing, one.unheld);
            missing := missing - part;
            IF action = 'hold' THEN
                UPDATE credits.lots l SET held = l.held + part WHERE l.lot_id = one.lot_id;
                held := held + part;
                pins := concat(pins, CASE WHEN pins <> '' THEN ',' END, '["', one.lot_id, '",', part, ']');
            ELSE
                UPDATE credits.lots l SET remaining = l.remaining - part, open = l.remaining > part
                WHERE l.lot_id = one.lot_id;
                IF one.pool = 'purchased' THEN purchased := purchased - part;
                ELSE subscription := subscription - part;
                END IF;
            END IF;
            moves := concat(moves, CASE WHEN moves <> '' THEN ',' END, '{"lot_id":"', one.lot_id, '","pool":"', one.pool,
                '","amount":', CASE action WHEN 'hold' THEN 0 ELSE -part END,
                ',"held":', CASE action WHEN 'hold' THEN part ELSE 0 END, '}');
            chain := concat(chain, CASE WHEN chain <> '' THEN ';' END, one.lot_id, ':', one.pool, ':',
                CASE action WHEN 'hold' THEN 0 ELSE -part END, ':', CASE action WHEN 'hold' THEN part ELSE 0 END);
            EXIT WHEN missing = 0;
        END LOOP;
        IF missing > 0 THEN
            RAISE EXCEPTION 'the totals of % are not those of its lots', account;
        END IF;
    ELSE
        SELECT * INTO g FROM credits.generations x WHERE x.generation_id = object;
        IF NOT FOUND OR g.state <> 'held' OR g.account_id <> account OR g.member_id IS NOT NULL
           OR g.counted_on IS NOT NULL OR g.released_to IS NOT NULL
        THEN
            RETURN NULL;
        END IF;
        price := CASE action WHEN 'capture' THEN coalesce(
            bench.price(coalesce(kind, g.kind), coalesce(model, g.model)) * coalesce(units, g.units, 1),
            claimed, g.held) ELSE 0 END;
        IF price > g.held THEN
            RETURN NULL;
        END IF;
        missing := price;
        FOR one IN SELECT (pin ->> 0)::uuid AS lot_id, (pin ->> 1)::bigint AS credits
                   FROM jsonb_array_elements(g.hold_allocation) pin
        LOOP
            part := least(missing, one.credits);
            missing := missing - part;
            UPDATE credits.lots l
            SET remaining = l.remaining - part, held = l.held - one.credits, open = l.remaining > part
            WHERE l.lot_id = one.lot_id RETURNING l.pool INTO of_pool;
            held := held - one.credits;
            IF of_pool = 'purchased' THEN purchased := purchased - part;
            ELSE subscription := subscription - part;
            END IF;
            moves := concat(moves, CASE WHEN moves <> '' THEN ',' END, '{"lot_id":"', one.lot_id, '","pool":"', of_pool,
                '","amount":', -part, ',"held":', -one.credits, '}');
            chain := concat(chain, CASE WHEN chain <> '' THEN ';' END, one.lot_id, ':', of_pool, ':', -part, ':', -one.credits);
        END LOOP;
    END IF;

    PERFORM bench.journal(
        event, a,
        CASE action WHEN 'hold' THEN 'generation_hold' WHEN 'book' THEN 'booking_debit'
                    WHEN 'capture' THEN 'generation_capture' ELSE 'generation_release' END,
        subscription, purchased, held, moves, chain, tx, decided_at);
    IF action = 'hold' THEN
        INSERT INTO credits.generations (
            generation_id, account_id, state, kind, model, units, held, hold_allocation, deadline_at, recorded_at)
        VALUES (object, account, 'held', kind, model, units, price, ('[' || pins || ']')::jsonb,
                decided_at + hold_seconds * interval '1 second', decided_at);
    ELSIF action = 'book' THEN
        earned := uuidv7();
        INSERT INTO credits.lots (
            lot_id, account_id, pool, granted, remaining, source_kind, source_reference, granted_version, granted_at)
        VALUES (earned, other, 'purchased', price, price, 'session_earning', 'booking:' || object, b.version + 1,
                CASE WHEN b.version > 0 THEN greatest(decided_at, b.updated_at) ELSE decided_at END);
        PERFORM bench.journal(
            event, b, 'session_earning', 0, price, 0,
            concat('{"lot_id":"', earned, '","pool":"purchased","amount":', price, ',"held":0}'),
            concat(earned, ':purchased:', price, ':0'), tx, decided_at);
        INSERT INTO credits.bookings (
            booking_id, client_account, practitioner_account, state, credits, earning_lot, recorded_at)
        VALUES (object, account, other, 'booked', price, earned, decided_at);
    ELSE
        UPDATE credits.generations x
        SET state = CASE action WHEN 'capture' THEN 'completed' ELSE action END, held = 0, hold_allocation = '[]',
            deadline_at = NULL, taken = price, recorded_at = decided_at
        WHERE x.generation_id = object;
    END IF;
    INSERT INTO credits.commands (scope, type, key, fingerprint, outcome, account_id, transaction_id, recorded_at)
    VALUES (event.scope, event.type, event.key, event.fingerprint, 'applied', account, tx, decided_at);
    RETURN CASE action WHEN 'book' THEN 2 ELSE 1 END;
END $$;
