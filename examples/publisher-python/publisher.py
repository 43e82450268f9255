# /// script
# requires-python = ">=3.11"
# dependencies = ["aiokafka>=0.14", "httpx>=0.28"]
# ///
"""A generation, paid with credits: reserve, do the work, capture; and each time wait for the one answer.

    python publisher.py USER [GENERATION]

Run it twice with the same generation: the second run asks under the same keys and is told the first outcome.
"""

import asyncio
import json
import os
import sys
import uuid
from pathlib import Path

import httpx
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

# A running `make run` says where everything is; in production the environment does.
HOME = Path(os.environ.get("CREDITS_HOME", ".credits"))
STACK = json.loads((HOME / "stack.json").read_text()) if (HOME / "stack.json").exists() else {}
KAFKA = os.environ.get("CREDITS_KAFKA_BOOTSTRAP") or STACK["kafka_bootstrap"]
API = os.environ.get("CREDITS_HTTP_URL") or STACK["http_url"]
TOKEN = os.environ.get("CREDITS_READ_TOKEN") or STACK["read_token"]
PREFIX = os.environ.get("CREDITS_TOPIC_PREFIX", "")

SOURCE = "/generation-service"
ANSWER_SECONDS = 5


async def publish(producer: AIOKafkaProducer, type_: str, data: dict, *, key: str) -> None:
    """Publish an event under an idempotency key. Whatever fails, publish it again under the same key."""
    await producer.send_and_wait(
        f"{PREFIX}generation.events",
        json.dumps(data).encode(),
        key=data["user_id"].encode(),
        headers=[
            ("ce_specversion", b"1.0"),
            ("ce_id", str(uuid.uuid4()).encode()),
            ("ce_source", SOURCE.encode()),
            ("ce_type", type_.encode()),
            ("ce_idempotencykey", key.encode()),
            ("content-type", b"application/json"),
        ],
    )


async def answer(answers: AIOKafkaConsumer, type_: str, *, key: str) -> dict:
    """The `credit.changed` or `credit.rejected` of our event; if none comes, what the ledger knows of it."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            async for record in answers:
                told = json.loads(record.value)
                cause = told["cause"]
                if (cause["source"], cause["type"], cause["idempotency_key"]) == (
                    SOURCE,
                    type_,
                    key,
                ):
                    return told
    except TimeoutError:
        pass  # it was answered before, it waits for something, or it is a dead letter: all of that can be asked
    async with httpx.AsyncClient(base_url=API) as api:
        response = await api.get(
            "/v1/commands",
            params={"source": SOURCE, "type": type_, "key": key},
            headers={"authorization": f"Bearer {TOKEN}"},
        )
        return response.raise_for_status().json()


async def main(user: str, generation: str) -> None:
    """Ask for two images, make them, pay for them."""
    producer = AIOKafkaProducer(bootstrap_servers=KAFKA, enable_idempotence=True)
    answers = AIOKafkaConsumer(
        f"{PREFIX}credit.changed",
        f"{PREFIX}credit.rejected",
        bootstrap_servers=KAFKA,
        auto_offset_reset="latest",
    )
    async with producer, answers:
        for partition in answers.assignment():
            await answers.position(partition)  # listen before you ask

        about = {"generation_id": generation, "user_id": user}
        asked = {**about, "kind": "image", "units": 2}
        await publish(producer, "generation.requested", asked, key=f"{generation}:requested")
        reserved = await answer(answers, "generation.requested", key=f"{generation}:requested")
        print(json.dumps(reserved), flush=True)
        if reserved.get("reason"):
            sys.exit(f"refused: {reserved['reason']}")

        # Here the images are made; had it failed, `generation.failed` would give the credits back.
        await publish(producer, "generation.completed", about, key=f"{generation}:completed")
        print(
            json.dumps(await answer(answers, "generation.completed", key=f"{generation}:completed"))
        )


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else str(uuid.uuid4())))
