"""`user-org-balances`: the user's balance is the truth, the organisation mirrors it; where they differ it is told."""

from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from workers.ledger.commands import (
    Action,
    ImportedEntry,
    MemberTerms,
    OrganisationMode,
    UpdateOrganisation,
)
from workers.operations.imports.books import (
    LONG_AGO,
    Context,
    Kind,
    Note,
    Part,
    Person,
    Row,
    Table,
    Tables,
    balance_entries,
    is_id,
    key_of,
    number_of,
    refused,
    whole,
)

USERS = Table("users", ("id", "creditBalance", "organizationId"))
ORGANISATIONS = Table("organizations", ("id",))
BALANCES = Table("credit_balances", ("organizationId", "balance"))


def _query(tables: Tables) -> str:
    return f"""
SELECT t.id::text AS owner, t."creditBalance"::numeric AS balance FROM {tables["users"].name} t ORDER BY 1"""


def organisations(tables: Tables) -> str:
    """Organisations, with what they and their members have; those that only a member or a balance names too."""
    return f"""
SELECT n.id AS organisation, o.id IS NOT NULL AS known, b.balance, b.rows, u.members, u.credits
FROM (
    SELECT id::text AS id FROM {tables["organizations"].name}
    UNION SELECT "organizationId"::text FROM {tables["users"].name} WHERE "organizationId" IS NOT NULL
    UNION SELECT "organizationId"::text FROM {tables["credit_balances"].name} WHERE "organizationId" IS NOT NULL
) n
LEFT JOIN {tables["organizations"].name} o ON o.id::text = n.id
LEFT JOIN (
    SELECT "organizationId"::text AS id, sum(balance::numeric) AS balance, count(*) AS rows
    FROM {tables["credit_balances"].name} GROUP BY 1
) b ON b.id = n.id
LEFT JOIN (
    SELECT "organizationId"::text AS id, array_agg(id::text ORDER BY id::text) AS members,
           sum(coalesce("creditBalance"::numeric, 0)) AS credits
    FROM {tables["users"].name} WHERE "organizationId" IS NOT NULL GROUP BY 1
) u ON u.id = n.id
ORDER BY 1"""


def _formula(tables: Tables) -> str:
    return f"""
SELECT t.id::text AS owner, ARRAY[t.id::text] AS keys, 0::bigint AS subscription,
       greatest(0, trunc(coalesce(t."creditBalance"::numeric, 0)))::bigint AS purchased,
       greatest(0, -trunc(coalesce(t."creditBalance"::numeric, 0)))::bigint AS debt
FROM {tables["users"].name} t ORDER BY 1"""


def _read(record: Mapping[str, Any], context: Context) -> Iterator[Person]:
    owner, balance = record["owner"], number_of(record["balance"])
    if not is_id(owner):
        yield refused(owner, balance, "no id that an owner may have")
        return
    credits, rest = whole(balance)
    notes = [*rest]
    if credits < 0:
        notes.append(Note(f"the balance is negative: {-credits} credits become debt"))
    entries = balance_entries(credits, context, f"user-org-balances {owner}")
    yield Person(
        owner=owner,
        balance=balance,
        purchased=max(0, credits),
        debt=max(0, -credits),
        rows=(Row(key=key_of(owner), balance=credits, entries=entries),),
        notes=tuple(notes),
    )


def _read_organisation(record: Mapping[str, Any], context: Context) -> Iterator[Person]:
    name = record["organisation"]
    members = [one for one in record["members"] or () if is_id(one)]
    if not is_id(name):
        yield refused(f"org:{name}", Decimal(0), "no id that an organisation may have")
        return
    mode: OrganisationMode = "mirror" if len(members) == 1 else "shared"
    notes = []
    if not record["known"]:
        notes.append(Note("it is no row of organizations"))
    if len(members) != 1:
        notes.append(Note(f"{len(members)} members: it is shared, with credits of its own alone"))
    if (record["rows"] or 0) > 1:
        notes.append(Note(f"{record['rows']} balances: taken together"))
    update = _update(name, mode, members)
    rows = [Row(key=key_of("organisation", name), action=update, people=tuple(members))]
    difference, rest = whole(number_of(record["balance"]) - number_of(record["credits"]))
    purchased = 0
    if record["balance"] is not None and (difference or rest):
        theirs = number_of(record["credits"])
        notes.append(Note(f"its balance is {record['balance']}, that of its members {theirs}"))
        if difference > 0 and context.options.prefer == "organisation":
            told = {"reason": f"the organisation's balance was {difference} above its members'"}
            entry = ImportedEntry(
                "adjustment",
                "purchased",
                difference,
                context.now,
                f"user-org-balances {name}",
                references=told,
            )
            purchased = difference
            rows.append(Row(key=key_of("difference", name), balance=difference, entries=(entry,)))
    # A mirror is its member's account: that is where its credits are.
    owner = members[0] if mode == "mirror" else f"org:{name}"
    yield Person(
        owner=owner,
        balance=Decimal(purchased),
        purchased=purchased,
        rows=tuple(rows),
        notes=tuple(Note(f"organisation {name}: {note.reason}", note.credits) for note in notes),
    )


def _update(
    name: str, mode: OrganisationMode, members: list[str]
) -> Callable[[str, Callable[[str], str]], Action]:
    def build(_account: str, account_of: Callable[[str], str]) -> Action:
        terms = tuple(MemberTerms(account_of(one)) for one in members)
        return UpdateOrganisation(name, mode, terms, as_of=LONG_AGO)

    return build


USER_ORG_BALANCES = Kind(
    name="user-org-balances",
    tables=(USERS, ORGANISATIONS, BALANCES),
    parts=(Part(_query, _read), Part(organisations, _read_organisation)),
    formula=_formula,
)
