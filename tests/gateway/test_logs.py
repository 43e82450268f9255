"""What a process writes to its log: one JSON object a line, and nothing that it must not tell."""

import json
import subprocess
import sys
from typing import Any

PROGRAM = """
import asyncio, logging, uuid
import asyncpg, structlog
from pydantic import BaseModel
from workers.telemetry import configure_logging, describe_error

configure_logging("json")
log = structlog.get_logger("test")
library = logging.getLogger("faststream")

class Model(BaseModel):
    amount: int

def attempt(action):
    try:
        action()
    except Exception as error:
        log.exception("failed", text="reach me: canary@example.com")
        library.error("it broke: %s", error, exc_info=error)
        log.warning("described", error=describe_error(error), raw=error)

attempt(lambda: int("canary"))
attempt(lambda: {}["canary"])
attempt(lambda: Model(amount="canary"))
attempt(lambda: json_error("canary"))
def refused():
    error = asyncpg.UniqueViolationError("duplicate canary")
    error.detail = "Key (email)=(canary@example.com) already exists"
    error.constraint_name = "one_each"
    raise error
attempt(refused)
log.info("values", key="whsec_canary", url="postgres://u:canary@db/x", header="Bearer canary",
         mail=["canary@example.com"], surrogate="\\ud800", thing=Model(amount=1), id=uuid.UUID(int=1))
logging.getLogger("uvicorn.access").info("GET /v1/accounts/canary@example.com")
logging.getLogger("httpx").info("GET /canary")
library.info("canary")
attempt(lambda: asyncio.run(asyncpg.connect("postgres://u:canary@127.0.0.1:9/x")))
"""


def test_no_line_quotes_a_payload_a_secret_or_an_address_and_each_is_json() -> None:
    """Errors of every kind, ours and the libraries', are logged with type, place and code but
    without the values they quote.
    """
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    assert b"canary" not in done.stdout
    assert done.stderr == b""
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(line["timestamp"].endswith("Z") and line["level"] for line in lines)
    failed = [line["raised"][0] for line in lines if line["event"] == "failed"]
    assert [error["type"] for error in failed] == [
        "ValueError",
        "KeyError",
        "ValidationError",
        "NameError",
        "UniqueViolationError",
        "ConnectionRefusedError",
    ]
    assert all(error["frames"] for error in failed)
    # What a person on call needs is there: the code, the constraint, and texts about machines.
    assert (failed[4]["sqlstate"], failed[4]["constraint_name"]) == ("23505", "one_each")
    assert "Connect call failed" in failed[5]["text"]
    (values,) = [line for line in lines if line["event"] == "values"]
    assert values["url"] == "postgres://[secret]@db/x"
    assert values["thing"] == "<Model>"
