"""What the guides show of the contract is of the contract."""

import json
import re
from pathlib import Path

import jsonschema_rs

from workers.messages.schemas import EXAMPLES, message_schemas

DOCS = Path(__file__).parents[2] / "docs"


def test_the_state_that_is_shown_is_one() -> None:
    """The JSON of the guide is of its schema, with every member."""
    (shown,) = re.findall(r"```json\n(.*?)```", (DOCS / "subscribing.md").read_text(), re.DOTALL)

    state = json.loads(shown)
    jsonschema_rs.validate(message_schemas()["credit.balance"], state)
    assert state == EXAMPLES["credit.balance"]
