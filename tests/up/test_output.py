"""What `credits up` prints when all is ready."""

from pathlib import Path

import pytest

from workers.up.output import SECRETS, Output
from workers.up.stack_file import Stack


def test_the_consoles_address_stands_beside_the_token_that_opens_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Who has just started everything finds the pages, and what to log in with, in one look."""
    stack = Stack(
        database_url="postgresql://me:secret@127.0.0.1:5432/credits",
        kafka_bootstrap="127.0.0.1:9092",
        http_url="http://127.0.0.1:8080",
        read_token="a-reader",
        admin_token="an-admin",
        stripe_webhook_secret="whsec_1",
        pids={},
    )
    output = Output(as_json=False)
    output.ready(stack, 1.0, home=Path("home"), secrets_shown=frozenset(SECRETS))
    output.close()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["console", "http://127.0.0.1:8080/console"] in lines
    assert ["admin", "token", "an-admin"] in lines
