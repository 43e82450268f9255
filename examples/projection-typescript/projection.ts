/**
 * Every account's balance in a table of our own, as an account page or an entitlement cache would keep it.
 *
 *     npm start            follow `credit.changed` for ever
 *     npm run rebuild      fill the table from `credit.balance`, which has the latest state of every account
 *
 * Kill it whenever you like. A change is told at least once, so it may come again, and late; its version says so.
 * The offset is committed after the transaction that it stands for: what was not kept is read again.
 */
import { randomUUID } from 'node:crypto'
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { Consumer, stringDeserializers } from '@platformatic/kafka'
import postgres from 'postgres'

// A running `make run` says where everything is; in production the environment does.
const env = process.env
const file = join(env.CREDITS_HOME ?? join(env.INIT_CWD ?? '.', '.credits'), 'stack.json')
const stack = existsSync(file) ? JSON.parse(readFileSync(file, 'utf8')) : {}
const kafka: string = env.CREDITS_KAFKA_BOOTSTRAP ?? stack.kafka_bootstrap
const api: string = env.CREDITS_HTTP_URL ?? stack.http_url
const token: string = env.CREDITS_READ_TOKEN ?? stack.read_token
const prefix = env.CREDITS_TOPIC_PREFIX ?? ''

const changed = `${prefix}credit.changed`
const balance = `${prefix}credit.balance`
const sql = postgres(env.PROJECTION_DATABASE_URL ?? stack.database_url, { onnotice: () => {} })

type Totals = { subscription: number; purchased: number; held: number; available: number; debt: number }
/** What a change, `credit.balance` and the API have in common. Credits are whole and below 2^53. */
type State = { account_id: string; version: number; balance: Totals }

async function prepare(): Promise<void> {
  await sql`CREATE SCHEMA IF NOT EXISTS account_page`
  await sql`
    CREATE TABLE IF NOT EXISTS account_page.balances (
      account_id   text PRIMARY KEY,
      version      bigint NOT NULL,
      subscription bigint NOT NULL,
      purchased    bigint NOT NULL,
      held         bigint NOT NULL,
      available    bigint NOT NULL,
      debt         bigint NOT NULL
    )`
}

/** Hold a state. What is not newer than what we hold changes nothing, whoever else writes at the same moment. */
async function keep(database: postgres.ISql<{}>, state: State): Promise<void> {
  const { subscription, purchased, held, available, debt } = state.balance
  await database`
    INSERT INTO account_page.balances AS ours
    VALUES (${state.account_id}, ${state.version}, ${subscription}, ${purchased}, ${held}, ${available}, ${debt})
    ON CONFLICT (account_id) DO UPDATE SET
      version = excluded.version, subscription = excluded.subscription, purchased = excluded.purchased,
      held = excluded.held, available = excluded.available, debt = excluded.debt
    WHERE ours.version < excluded.version`
}

/** A subscriber's whole duty. */
async function apply(database: postgres.ISql<{}>, change: State): Promise<void> {
  const { account_id: account, version } = change
  const [known] = await database`SELECT version FROM account_page.balances WHERE account_id = ${account}`
  await keep(database, change)
  if (version > Number(known?.version ?? 0) + 1) {
    // We missed something: the ledger knows.
    const address = `${api}/v1/accounts/${encodeURIComponent(account)}`
    const answer = await fetch(address, { headers: { authorization: `Bearer ${token}` } })
    if (!answer.ok) throw new Error(`the ledger answered ${answer.status}`)
    await keep(database, (await answer.json()) as State)
    console.log(`${account}: mended a gap before version ${version}`)
  }
}

function member(groupId: string): Consumer<string, string, string, string> {
  return new Consumer({
    clientId: 'account-page',
    bootstrapBrokers: [kafka],
    groupId,
    // The same name in every life of this instance (a stateful pod's): it gets its partitions back at once.
    ...(env.PROJECTION_INSTANCE ? { groupInstanceId: env.PROJECTION_INSTANCE } : {}),
    autocommit: false,
    deserializers: stringDeserializers
  })
}

/** Apply every change, for ever. Any error ends the process; whoever restarts it finds nothing half done. */
async function follow(): Promise<void> {
  const consumer = member(`${prefix}account-page`)
  const messages = await consumer.consume({ topics: [changed], mode: 'committed', fallbackMode: 'earliest' })
  console.log(`following ${changed}`)
  for await (const message of messages) {
    await sql.begin((database) => apply(database, JSON.parse(message.value)))
    await message.commit()
  }
}

/** Read `credit.balance` to its present end. Not while another instance follows. */
async function rebuild(): Promise<void> {
  // Whoever follows begins at the beginning: most of it will be old news, but nothing can be missing.
  const place = member(`${prefix}account-page`)
  place.topics.track(changed)
  await place.joinGroup({})
  const ours = place.assignments?.find(({ topic }) => topic === changed)?.partitions ?? []
  await place.commit({
    offsets: ours.map((partition) => ({ topic: changed, partition, offset: 0n, leaderEpoch: -1 }))
  })
  await place.close(true)

  const consumer = member(`rebuild-${randomUUID()}`)
  const ends = (await consumer.listOffsets({ topics: [balance] })).get(balance) ?? []
  const missing = new Set([...ends.keys()].filter((partition) => ends[partition] !== 0n))
  if (missing.size > 0) {
    for await (const message of await consumer.consume({ topics: [balance], mode: 'earliest' })) {
      await keep(sql, JSON.parse(message.value))
      if (message.offset + 1n >= (ends[message.partition] ?? 0n)) missing.delete(message.partition)
      if (missing.size === 0) break
    }
  }
  await consumer.close(true)
  const [row] = await sql`SELECT count(*) FROM account_page.balances`
  console.log(`rebuilt ${row?.count} accounts from ${balance}`)
}

await prepare()
await (process.argv[2] === 'rebuild' ? rebuild() : follow())
await sql.end()
