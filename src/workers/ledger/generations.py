"""Generations: reserve, capture, release, debit, refund (R5, R7, R14)."""

from datetime import timedelta

from workers.ledger import organisations
from workers.ledger.commands import (
    Action,
    CompleteGeneration,
    EndGeneration,
    RefundGeneration,
    RequestGeneration,
)
from workers.ledger.grants import BALANCE_MAX, too_much
from workers.ledger.model import Account, Alert, Generation, Pinned
from workers.ledger.outcomes import APPLIED, DUPLICATE, Outcome, Rejected
from workers.ledger.writer import Move, Transaction, Writer


def request_generation(
    writer: Writer, action: RequestGeneration, transaction: Transaction
) -> Outcome:
    """Reserve the price: credits leave `available`, not the balance, and stay pinned to their lots."""
    account = writer.account(action.account)
    known = _known(writer, action.generation_id)
    price = _price(writer, action.kind, action.model, action.units, action.credits)
    if known is not None:
        return _repeated_request(writer, account, known, price, action.organization_id)
    payer = organisations.payer_of(writer, account, action.organization_id)
    if payer is None:
        return Rejected("not_a_member", account.account_id, price, account.available)
    account = payer.account
    if price is None:
        return Rejected("unknown_price", account.account_id, None, account.available)
    if price > BALANCE_MAX:
        return Rejected("invalid_amount", account.account_id, price, account.available)
    refused = _beyond_daily_limit(writer, payer, price) or organisations.beyond_limit(
        writer, payer, price
    )
    if refused is not None:
        return refused
    if account.available < price:
        return Rejected("insufficient_credits", account.account_id, price, account.available)

    seconds = action.hold_seconds or writer.catalogue.hold_seconds(action.kind)
    taken = writer.take(account, price)
    generation = Generation(
        generation_id=action.generation_id,
        account_id=account.account_id,
        member_id=payer.member_id,
        state="held",
        kind=action.kind,
        model=action.model,
        units=action.units,
        held=price,
        pinned=tuple(Pinned(move.lot.lot_id, -move.amount) for move in taken),
        deadline_at=writer.now + timedelta(seconds=seconds),
        recorded_at=writer.now,
        fresh=True,
    )
    writer.state.generations[action.generation_id] = generation
    writer.count_generation(account, generation)
    moves = [Move(move.lot, 0, -move.amount) for move in taken]
    writer.write(account, "generation_hold", moves, transaction, member_id=payer.member_id)
    return APPLIED


def _beyond_daily_limit(writer: Writer, payer: organisations.Payer, price: int) -> Rejected | None:
    """R14. It does not limit what an organisation pays: a person's tier says what that person gets for nothing, and a
    colleague on the free tier must not be kept from credits that his organisation bought. Its credits and the member's
    limit decide there (R15).
    """
    account = payer.account
    limit = writer.catalogue.daily_generations(account.tier)
    if payer.member_id is not None or limit is None:
        return None
    if writer.usage(account.account_id).generations < limit:
        return None
    return Rejected("daily_limit", account.account_id, price, account.available)


def _repeated_request(
    writer: Writer,
    account: Account,
    known: Generation,
    price: int | None,
    organization_id: str | None,
) -> Outcome:
    """Who left an organisation, or sees it change its mode, repeats himself all the same."""
    if known.state != "held" or known.account_id is None:
        return Rejected("hold_closed", account.account_id, price, account.available)
    requester, organisation = known.account_id, None
    if known.member_id is not None:
        requester, organisation = f"user:{known.member_id}", known.account_id
    same_payer = organisation is None or organisation == f"org:{organization_id}"
    if writer.heir(requester) == account.account_id and same_payer and known.held == price:
        return DUPLICATE
    return Rejected("invalid_amount", account.account_id, price, account.available)


def complete_generation(
    writer: Writer, action: CompleteGeneration, transaction: Transaction
) -> Outcome:
    """Capture the actual cost and release the rest; without an open hold, debit what was done (R5)."""
    known = _known(writer, action.generation_id)
    if known is not None and known.state == "completed":
        return DUPLICATE
    cost = _cost(writer, action, known)
    if known is not None and known.state == "held":
        return _capture(writer, known, cost or known.held, transaction)

    payer = _payer(writer, action, known)
    if payer is None:
        stranger = writer.account(action.account)
        return Rejected("not_a_member", stranger.account_id, cost, stranger.available)
    account = payer.account
    if organisations.closed(writer, payer):
        return Rejected("account_closed", account.account_id, cost, account.available)
    if cost is None:
        return Rejected("unknown_price", account.account_id, None, account.available)
    if cost > BALANCE_MAX:
        return Rejected("invalid_amount", account.account_id, cost, account.available)
    if account.available < cost:
        return Rejected("insufficient_credits", account.account_id, cost, account.available)
    generation = known or Generation(
        generation_id=action.generation_id,
        account_id=account.account_id,
        state="completed",
        kind=action.kind,
        model=action.model,
        units=action.units,
        recorded_at=writer.now,
        fresh=True,
    )
    generation.account_id, generation.member_id = account.account_id, payer.member_id
    writer.state.generations[action.generation_id] = generation
    writer.close_hold(generation, "completed")
    generation.taken = cost
    writer.count_generation(account, generation)
    moves = writer.take(account, cost)
    writer.write(account, "generation_debit", moves, transaction, member_id=payer.member_id)
    return APPLIED


def _payer(
    writer: Writer, action: CompleteGeneration, known: Generation | None
) -> organisations.Payer | None:
    """Whoever was to pay when it was requested; where nobody requested it, whom the completion names."""
    if known is None or known.account_id is None or known.kind is None:
        account = writer.account(action.account)
        return organisations.payer_of(writer, account, action.organization_id)
    account = organisations.home(writer, known.account_id)
    return organisations.Payer(account, organisations.member_of(writer, known, account))


def _cost(writer: Writer, action: CompleteGeneration, known: Generation | None) -> int | None:
    """The catalogue's price for the completed units, else the event's amount, else None (R5)."""
    kind = action.kind or (known.kind if known else None)
    model = action.model or (known.model if known else None)
    units = action.units or (known.units if known else None) or 1
    return _price(writer, kind, model, units, action.credits)


def _price(
    writer: Writer, kind: str | None, model: str | None, units: int, claimed: int | None
) -> int | None:
    """The catalogue's price, else the event's claim (R14). Beyond what anybody can hold one price is as good as another,
    and has to fit where refusals are kept.
    """
    price = writer.catalogue.generation_price(kind, model, units) or claimed
    return None if price is None else min(price, BALANCE_MAX + 1)


def _capture(
    writer: Writer, generation: Generation, cost: int, transaction: Transaction
) -> Outcome:
    account = writer.account(generation.account_id or "")
    held = generation.held
    excess = max(0, cost - held)
    if excess > account.available:
        message = f"generation {generation.generation_id} cost {cost} credits; {held} were held and captured"
        details = {
            "generation_id": generation.generation_id,
            "shortfall": excess,
            "available": account.available,
        }
        cause = transaction.published()
        writer.alerts.append(
            Alert("capture_shortfall", account.account_id, message, details, cause)
        )
        excess = 0
    captured = min(cost, held)
    extra = {move.lot.lot_id: move for move in writer.take(account, excess)}
    moves, released, left = [], [], captured
    for pin in generation.pinned:
        part = min(pin.credits, left)
        left -= part
        lot = writer.lot(pin.lot_id)
        released.append((lot, pin.credits - part))
        # A lot may give both what it held and a part of the excess; the entry names it once.
        more = extra.pop(pin.lot_id, None)
        moves.append(Move(lot, (more.amount if more else 0) - part, -pin.credits))
    generation.taken, to = captured + excess, generation.released_to
    writer.close_hold(generation, "completed")
    moves += extra.values()
    writer.write(account, "generation_capture", moves, transaction, member_id=generation.member_id)
    writer.after_release(account, released, transaction, to=to)
    return APPLIED


def end_generation(writer: Writer, action: EndGeneration, transaction: Transaction) -> Outcome:
    """Release what was held. An end that arrives before its request leaves a tombstone (R5)."""
    known = _known(writer, action.generation_id)
    if known is None:
        # Refused, because there is nothing to release; remembered, so that the late request is refused too.
        writer.state.generations[action.generation_id] = Generation(
            generation_id=action.generation_id,
            account_id=action.account,
            state=action.state,
            recorded_at=writer.now,
            fresh=True,
        )
        return Rejected("unknown_hold", writer.account(action.account).account_id)
    if known.state == "completed":
        return Rejected("hold_closed", known.account_id)
    if known.state != "held":
        return DUPLICATE
    account = writer.account(known.account_id or action.account)
    released, to = writer.pinned(known), known.released_to
    moves = writer.unpin(known)
    writer.close_hold(known, action.state)
    writer.write(account, "generation_release", moves, transaction, member_id=known.member_id)
    writer.after_release(account, released, transaction, to=to)
    return APPLIED


def refund_generation(
    writer: Writer, action: RefundGeneration, transaction: Transaction
) -> Outcome:
    """Give credits back to the purchased pool, at most what the generation took (R7)."""
    known = _known(writer, action.generation_id)
    if known is None or known.state != "completed" or known.account_id is None:
        return Rejected("unknown_hold", action.account, action.credits)
    left = known.taken - known.given_back
    credits = min(action.credits or left, left)
    if credits == 0:
        return DUPLICATE
    account = organisations.home(writer, known.account_id)
    if too_much(account, credits):
        return Rejected("invalid_amount", account.account_id, credits)
    known.given_back += credits
    known.changed = True
    reference = f"generation:{known.generation_id}"
    writer.grant(
        account,
        "generation_refund",
        "purchased",
        credits,
        transaction,
        reference=reference,
        member_id=organisations.member_of(writer, known, account),
    )
    return APPLIED


def finishes(writer: Writer, action: Action) -> bool:
    """Whether a command only finishes what is open or over: a closed account is no reason to refuse it."""
    match action:
        case CompleteGeneration():
            known = _known(writer, action.generation_id)
            return known is not None and known.state in ("held", "completed")
        case EndGeneration() | RefundGeneration():
            return action.generation_id in writer.state.generations
        case _:
            return False


def _known(writer: Writer, generation_id: str) -> Generation | None:
    """The generation, after its account is settled: a hold past its deadline counts as released (R5)."""
    known = writer.state.generations.get(generation_id)
    if known is not None and known.account_id is not None:
        writer.account(known.account_id)
    return known
