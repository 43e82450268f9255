/**
 * A generation, paid with credits: reserve, do the work, capture; and each time wait for the one answer.
 *
 *     npm start USER [GENERATION]
 *
 * Run it twice with the same generation: the second run asks under the same keys and is told the first outcome.
 */
import { randomUUID } from 'node:crypto'
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as after } from 'node:timers/promises'
import { Consumer, Producer, stringDeserializers, stringSerializers } from '@platformatic/kafka'

// A running `make run` says where everything is; in production the environment does.
const env = process.env
const file = join(env.CREDITS_HOME ?? join(env.INIT_CWD ?? '.', '.credits'), 'stack.json')
const stack = existsSync(file) ? JSON.parse(readFileSync(file, 'utf8')) : {}
const kafka: string = env.CREDITS_KAFKA_BOOTSTRAP ?? stack.kafka_bootstrap
const api: string = env.CREDITS_HTTP_URL ?? stack.http_url
const token: string = env.CREDITS_READ_TOKEN ?? stack.read_token
const prefix = env.CREDITS_TOPIC_PREFIX ?? ''

const source = '/generation-service'
const answerMs = 5000

const shared = { clientId: 'generation-service', bootstrapBrokers: [kafka] }
const producer = new Producer({ ...shared, idempotent: true, serializers: stringSerializers })
const consumer = new Consumer({ ...shared, groupId: `answers-${randomUUID()}`, deserializers: stringDeserializers })

type Data = { user_id: string; [field: string]: unknown }

/** Publish an event under an idempotency key. Whatever fails, publish it again under the same key. */
async function publish(type: string, data: Data, key: string): Promise<void> {
  const headers = {
    ce_specversion: '1.0',
    ce_id: randomUUID(),
    ce_source: source,
    ce_type: type,
    ce_idempotencykey: key,
    'content-type': 'application/json'
  }
  const topic = `${prefix}generation.events`
  await producer.send({ messages: [{ topic, key: data.user_id, value: JSON.stringify(data), headers }] })
}

type Told = { reason?: string | null; cause?: { source: string; type: string; idempotency_key: string } }
const waiting = new Map<string, (told: Told) => void>()

/** Hand each answer to whoever waits for it. */
async function listen(): Promise<void> {
  const topics = [`${prefix}credit.changed`, `${prefix}credit.rejected`]
  const answers = await consumer.consume({ topics, mode: 'latest' })
  answers.on('data', ({ value }) => {
    const told: Told = JSON.parse(value)
    if (told.cause?.source === source) waiting.get(`${told.cause.type} ${told.cause.idempotency_key}`)?.(told)
  })
}

/** Publish; then the `credit.changed` or `credit.rejected` of it; if none comes, what the ledger knows of it. */
async function ask(type: string, data: Data, key: string): Promise<Told> {
  const answer = new Promise<Told>((resolve) => waiting.set(`${type} ${key}`, resolve))
  await publish(type, data, key)
  const told = await Promise.race([answer, after(answerMs, null, { ref: false })])
  if (told !== null) return told
  // It was answered before, it waits for something, or it is a dead letter: all of that can be asked.
  const asked = new URLSearchParams({ source, type, key })
  const response = await fetch(`${api}/v1/commands?${asked}`, { headers: { authorization: `Bearer ${token}` } })
  if (!response.ok) throw new Error(`the ledger answered ${response.status}`)
  return (await response.json()) as Told
}

const [user, generation = randomUUID()] = process.argv.slice(2)
if (user === undefined) throw new Error('whose generation?')
const about = { generation_id: generation, user_id: user }

await listen()
const asked = { ...about, kind: 'image', units: 2 }
const reserved = await ask('generation.requested', asked, `${generation}:requested`)
console.log(JSON.stringify(reserved))
if (reserved.reason) {
  console.error(`refused: ${reserved.reason}`)
  process.exitCode = 1
} else {
  // Here the images are made; had it failed, `generation.failed` would give the credits back.
  console.log(JSON.stringify(await ask('generation.completed', about, `${generation}:completed`)))
}
await Promise.all([consumer.close(true), producer.close()])
