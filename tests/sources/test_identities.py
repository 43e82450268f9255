"""R13: whose an id is, from the rows of the mapping table."""

import pytest

from workers.sources import Identities


@pytest.mark.parametrize(
    ("expected", "what", "rows"),
    [
        ("user:x", "nobody knows it", []),
        ("user:ann", "the provider of user ids does", [("x", "user", "user:ann")]),
        ("user:ann", "another provider does", [("x", "auth0", "user:ann")]),
        ("org:o1", "and says an organisation", [("x", "auth0", "org:o1")]),
        ("user:ann", "two providers agree", [("x", "auth0", "user:ann"), ("x", "legacy", "user:ann")]),
        ("user:x", "two providers disagree", [("x", "auth0", "user:ann"), ("x", "legacy", "user:bob")]),
        (
            "user:ann",
            "the provider of user ids decides between them",
            [("x", "auth0", "user:bob"), ("x", "user", "user:ann"), ("x", "legacy", "user:cat")],
        ),
        ("user:x", "only Stripe does", [("x", "stripe", "user:ann")]),
        ("user:x", "only an address does", [("x", "email", "user:ann")]),
        ("user:ann", "Stripe disagrees", [("x", "stripe", "user:bob"), ("x", "auth0", "user:ann")]),
        ("user:x", "it is another id", [("y", "user", "user:ann")]),
    ],
)  # fmt: skip
def test_a_user_id_is_mapped_else_itself(
    expected: str, what: str, rows: list[tuple[str, str, str]]
) -> None:
    """The table decides where it is of one mind about a user id; else the id is its own owner."""
    assert expected == Identities(rows).user("x"), what


def test_an_external_id_is_of_its_provider_only() -> None:
    """The same text under two providers is two ids; one that nobody mapped has no owner."""
    identities = Identities([("x", "stripe", "user:ann"), ("x", "auth0", "user:bob")])

    assert identities.external("stripe", "x") == "user:ann"
    assert identities.external("auth0", "x") == "user:bob"
    assert identities.external("email", "x") is None
    assert identities.external("stripe", "y") is None
