"""Generation events → commands (R5, R14)."""

from workers.ledger.commands import (
    Action,
    Cause,
    Command,
    CompleteGeneration,
    EndGeneration,
    RefundGeneration,
    RequestGeneration,
)
from workers.messages.envelope import Event
from workers.messages.inbound import (
    GENERATION_TYPES,
    Data,
    GenerationCompleted,
    GenerationEnded,
    GenerationRefunded,
    GenerationRequested,
)
from workers.messages.record import Record
from workers.sources.cloudevents import cause_of, fingerprint, open_envelope, read_data
from workers.sources.understood import Identities, Ignored, Understood


def read_generation(record: Record) -> Understood | Ignored:
    """Understand a record of `generation.events`. Raises Refused for one that can never be applied."""
    event = open_envelope(record, GENERATION_TYPES)
    if isinstance(event, Ignored):
        return event
    return understand_generation(event, cause_of(event, record))


def understand_generation(event: Event, cause: Cause) -> Understood:
    """Understand an event of a generation, whatever door it came through. Raises Refused for data that are wrong."""
    data = read_data(GENERATION_TYPES[event.type], event.data)
    content = fingerprint(event.type, data)
    user_id: str = data.user_id  # type: ignore[attr-defined]  # every generation model has it
    generation_id: str = data.generation_id  # type: ignore[attr-defined]  # every generation model has it
    cancelled = event.type == "generation.cancelled"

    def build(identities: Identities) -> Command:
        return Command(cause, _action(data, identities.user(user_id), cancelled=cancelled), content)

    return Understood(cause, (user_id,), build, generation_id=generation_id)


def _action(data: Data, account: str, *, cancelled: bool) -> Action:
    match data:
        case GenerationRequested():
            return RequestGeneration(
                account,
                data.generation_id,
                data.kind,
                data.model,
                data.units,
                data.credits,
                data.hold_seconds,
                data.organization_id,
            )
        case GenerationCompleted():
            return CompleteGeneration(
                account,
                data.generation_id,
                data.kind,
                data.model,
                data.units,
                data.credits,
                data.organization_id,
            )
        case GenerationEnded():
            return EndGeneration(
                account, data.generation_id, "cancelled" if cancelled else "failed"
            )
        case GenerationRefunded():
            return RefundGeneration(account, data.generation_id, data.credits)
        case _:
            raise TypeError(f"{type(data).__name__} is not a generation event")
