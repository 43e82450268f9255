"""Whether a database may be trusted with money: asked once before a worker begins, and after every outage.

Hides the question. A setting that would lose a commit, let a wait last for ever or the journal be rewritten is refused
with a sentence that says which it is and how to mend it; nothing is applied meanwhile, and nothing becomes a dead letter.
What is asked is what a session of the worker really has: a pooler, a role or a failover may change what was asked for.
"""

from __future__ import annotations

import asyncpg

from workers.store.sql import SQL

# What each setting must not be, with the harm and the mend.
REFUSED: dict[str, tuple[frozenset[str], str]] = {
    "fsync": (
        frozenset({"off"}),
        "a crash of the machine would damage the books. Set `fsync = on`",
    ),
    "full_page_writes": (
        frozenset({"off"}),
        "a crash of the machine could tear a page of the books. Set `full_page_writes = on`",
    ),
    "synchronous_commit": (
        frozenset({"off", "local"}),
        "a commit that was acknowledged could be lost. Set `synchronous_commit = on`, also for the database and its roles",
    ),
    "zero_damaged_pages": (
        frozenset({"on"}),
        "damage would be read as emptiness. Set `zero_damaged_pages = off`",
    ),
    "session_replication_role": (
        frozenset({"replica", "local"}),
        "constraints and triggers would not guard the books. Set `session_replication_role = origin`",
    ),
    "statement_timeout": (
        frozenset({"0"}),
        "a statement could last for ever. The worker sets it when it connects: a pooler must let it through",
    ),
    "lock_timeout": (
        frozenset({"0"}),
        "a wait for a lock could last for ever. The worker sets it when it connects: a pooler must let it through",
    ),
    "idle_in_transaction_session_timeout": (
        frozenset({"0"}),
        "a frozen worker would keep its locks. The worker sets it when it connects: a pooler must let it through",
    ),
}
# These have one value that is right.
REQUIRED: dict[str, tuple[str, str]] = {
    "transaction_isolation": (
        "read committed",
        "what others commit meanwhile would not be seen. Set `default_transaction_isolation` to 'read committed'",
    ),
    "server_encoding": ("UTF8", "not every text could be kept. Make the database in UTF8"),
}
SETTINGS = (*REFUSED, *REQUIRED)


class UnsafeDatabaseError(Exception):
    """The database is set up so that money could be lost; the message says what to mend. Nothing was applied."""


async def refuse_unsafe(pool: asyncpg.Pool[asyncpg.Record]) -> list[str]:
    """Ask the database how it is set up. Returns what a person should know although it can be worked with.

    Raises:
        UnsafeDatabaseError: it would lose, block or let be rewritten what is written to it.
        OSError, asyncpg errors: it does not answer.
    """
    async with pool.acquire(timeout=5) as connection:
        # Each question is a transaction of its own, whose isolation is that of every batch.
        values = {
            row["name"]: row["setting"]
            for row in await connection.fetch(SQL["ask_settings"], list(SETTINGS), timeout=5)
        }
        rights = await connection.fetchrow(SQL["ask_rights"], timeout=5)
    assert rights is not None  # an aggregate
    wrong = [
        f"`{name}` is {values[name]}: {harm}"
        for name, (refused, harm) in REFUSED.items()
        if values[name] in refused
    ]
    wrong += [
        f"`{name}` is {values[name]}: {harm}"
        for name, (right, harm) in REQUIRED.items()
        if values[name] != right
    ]
    if rights["rewrites"]:
        wrong.append(
            f"the role {rights['acts_as']} may change or remove entries ({', '.join(rights['rewrites'])}): the journal is "
            "only ever added to. Revoke it, and let the worker act as `credits_worker`"
        )
    if wrong:
        raise UnsafeDatabaseError(
            f"The database must not be used as it is set up: {'; '.join(wrong)}."
        )
    known = []
    login = rights["logs_in_as"]
    own_login = (
        "give workers a login of their own that is a member of `credits_worker` and of nothing else"
    )
    if rights["logs_in_as_superuser"]:
        known.append(
            f"the login {login} is a superuser, who may do anything to the journal, and only `credits audit` would see it: "
            f"{own_login}"
        )
    elif rights["may_be_owner"]:
        known.append(
            f"the login {login} may act as the owner of the journal, who may take its guards away: {own_login}"
        )
    elif rights["may_put_guards_to_sleep"]:
        known.append(
            f"the login {login} may set `session_replication_role`, under which constraints do not guard the books: "
            f"`REVOKE SET ON PARAMETER session_replication_role FROM {login}`"
        )
    if rights["asleep"]:
        known.append(
            f"triggers that guard the books are disabled: {', '.join(rights['asleep'])}. Enable them ALWAYS, then run "
            "`credits audit`"
        )
    return known
