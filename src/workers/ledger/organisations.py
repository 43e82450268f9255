"""Organisations (R15): a mirror is a view of its sole member, a shared one an account that its members spend from."""

from typing import NamedTuple

from workers.ledger.commands import UpdateOrganisation
from workers.ledger.model import Account, Generation, Member, Organisation
from workers.ledger.outcomes import APPLIED, DUPLICATE, Outcome, Rejected
from workers.ledger.writer import Transaction, Writer


class Payer(NamedTuple):
    """Whose credits pay for a generation; `member_id` is who spends them where they are an organisation's."""

    account: Account
    member_id: str | None = None
    terms: Member | None = None


def payer_of(writer: Writer, account: Account, organization_id: str | None) -> Payer | None:
    """Who pays for what an account generates: itself, or the organisation that it names; None for a stranger there."""
    if organization_id is None:
        return Payer(account)
    known = writer.state.organisations.get(organization_id)
    terms = known.members.get(account.account_id) if known is not None else None
    if known is None or terms is None:
        return None
    if known.mode == "mirror":
        return Payer(account)
    return Payer(writer.account(f"org:{organization_id}"), bare(account.account_id), terms)


def beyond_limit(writer: Writer, payer: Payer, price: int) -> Rejected | None:
    """Whether a member would have more in use than his limit allows; work that is done is counted, never refused (R5)."""
    terms = payer.terms
    if payer.member_id is None or terms is None or terms.limit_credits is None:
        return None
    used = writer.used_in(payer.account, payer.member_id, terms.period or "month")
    left = max(0, terms.limit_credits - used)
    return Rejected("member_limit", payer.account.account_id, price, left) if price > left else None


def closed(writer: Writer, payer: Payer) -> bool:
    """Whether nothing new may be asked of who pays, or of the member for whom it is paid."""
    member = f"user:{payer.member_id}" if payer.member_id is not None else None
    accounts = [payer.account, *([writer.account(member)] if member else [])]
    return any(account.state != "open" for account in accounts)


def home(writer: Writer, account_id: str) -> Account:
    """Where an owner's credits are: those of a mirror are its member's."""
    if account_id.startswith("org:"):
        known = writer.state.organisations.get(account_id.removeprefix("org:"))
        if known is not None and known.mode == "mirror":
            return writer.account(next(iter(known.members)))
    return writer.account(account_id)


def member_of(writer: Writer, generation: Generation, account: Account) -> str | None:
    """Who generated, as far as it is the organisation's account that has to tell."""
    if generation.member_id is None or account.account_id != generation.account_id:
        return None
    return bare(writer.heir(f"user:{generation.member_id}"))


def bare(account_id: str) -> str:
    """A user's id as members are named: without `user:`."""
    return account_id.removeprefix("user:")


def update_organisation(
    writer: Writer, action: UpdateOrganisation, transaction: Transaction
) -> Outcome:
    """Who belongs to it, from now on, and where its credits are: a change of its mode moves them."""
    state = writer.state.organisations
    known = state.get(action.organisation)
    if known is not None and action.as_of < known.as_of:
        return DUPLICATE
    members: dict[str, Member] = {}
    for one in action.members:
        # Two ids of one person: the first stands.
        terms = Member(limit_credits=one.limit, period=one.period, changed=True)
        members.setdefault(writer.account(one.account).account_id, terms)
    own = writer.account(action.account)
    sole = writer.account(next(iter(members))) if action.mode == "mirror" else None
    if sole is not None and sole.state != "open":
        return Rejected("account_closed", sole.account_id)
    if sole is not None:
        _switch(writer, own, sole, transaction)  # a mirror has nothing of its own to give
    elif known is not None and known.mode == "mirror":
        alone = writer.account(next(iter(known.members)))
        if alone.account_id in members and alone.state == "open":
            _switch(writer, alone, own, transaction)
    if known is None:
        known = state[action.organisation] = Organisation(
            organization_id=action.organisation,
            mode=action.mode,
            as_of=action.as_of,
            recorded_at=writer.now,
        )
    known.left = (known.left | known.members.keys()) - members.keys()
    known.mode, known.as_of, known.recorded_at = action.mode, action.as_of, writer.now
    known.members, known.changed = members, True
    return APPLIED


def _switch(writer: Writer, giver: Account, receiver: Account, transaction: Transaction) -> None:
    """Unheld credits move as they are; what open holds will release to the giver goes to the receiver instead."""
    giver.must_be_whole()
    parts = [(lot, lot.unheld) for lot in giver.lots]
    writer.hand_over(giver, receiver, parts, transaction)
    for generation in writer.state.generations.values():
        if generation.state != "held" or generation.account_id is None:
            continue
        goes_to = writer.heir(generation.released_to or generation.account_id)
        if goes_to == giver.account_id:
            returns = receiver.account_id == generation.account_id
            generation.released_to = None if returns else receiver.account_id
            generation.changed = True


def hand_over_memberships(writer: Writer, source: Account, target: Account) -> None:
    """A merged account's places in organisations, and what it used there, are its heir's (R13)."""
    was, becomes = bare(source.account_id), bare(target.account_id)
    for known in writer.state.organisations.values():
        terms = known.members.pop(source.account_id, None)
        if terms is not None:
            known.left.add(source.account_id)
            if target.account_id not in known.members:
                terms.changed = True
                known.members[target.account_id] = terms
                known.left.discard(target.account_id)
    for (account_id, member_id, day), share in list(writer.state.member_usage.items()):
        if member_id == was and (share.held or share.captured):
            taken_over = writer.member_usage(account_id, becomes, day)
            taken_over.held += share.held
            taken_over.captured += share.captured
            share.held = share.captured = 0
            taken_over.changed = share.changed = True


def hand_over_releases(writer: Writer, source: Account, target: Account) -> None:
    """So are what it generates for organisations, and what holds elsewhere will release to it."""
    was, becomes = bare(source.account_id), bare(target.account_id)
    for generation in writer.state.generations.values():
        if generation.state != "held":
            continue
        if generation.member_id == was:
            generation.member_id, generation.changed = becomes, True
        if generation.released_to == source.account_id:
            generation.released_to, generation.changed = target.account_id, True
        if generation.released_to == generation.account_id:
            generation.released_to, generation.changed = None, True
