"""Account events → commands: sign-up, links, closing, organisations, grants, adjustments, transfers (R13, R14, R15)."""

from zoneinfo import ZoneInfo

from workers.ledger.commands import (
    Action,
    AdjustCredits,
    Cause,
    CloseAccount,
    Command,
    GrantCredits,
    LimitPeriod,
    Link,
    LinkIdentities,
    MemberTerms,
    MergeAccounts,
    RegisterUser,
    TransferCredits,
    UpdateOrganisation,
)
from workers.messages.envelope import Event
from workers.messages.inbound import (
    ACCOUNT_TYPES,
    CreditsAdjusted,
    CreditsGranted,
    CreditsTransferred,
    Data,
    OrganizationMember,
    OrganizationUpdated,
    UserClosed,
    UserCreated,
    UserLinked,
    UserMerged,
)
from workers.messages.record import Record
from workers.sources.cloudevents import cause_of, fingerprint, open_envelope, read_data
from workers.sources.understood import EMAIL, NEVER_A_USER, USER, Identities, Ignored, Understood


def read_account(record: Record) -> Understood | Ignored:
    """Understand a record of `account.events`. Raises Refused for one that can never be applied."""
    event = open_envelope(record, ACCOUNT_TYPES)
    if isinstance(event, Ignored):
        return event
    return understand_account(event, cause_of(event, record))


def understand_account(event: Event, cause: Cause) -> Understood:
    """Understand an event of an account, whatever door it came through. Raises Refused for data that are wrong."""
    data = read_data(ACCOUNT_TYPES[event.type], event.data)
    content = fingerprint(event.type, data)

    def build(identities: Identities) -> Command:
        action = _action(data, identities, cause)
        return Command(cause, action, content, _links(data, identities))

    return Understood(cause, _external_ids(data), build)


def _owner(data: CreditsGranted | CreditsAdjusted, identities: Identities) -> str:
    return identities.user(data.user_id) if data.user_id else f"org:{data.organization_id}"


def _action(data: Data, identities: Identities, cause: Cause) -> Action:
    match data:
        case UserCreated():
            zone = ZoneInfo(data.time_zone) if data.time_zone else None
            return RegisterUser(identities.user(data.user_id), data.tier, data.time_zone, zone)
        case UserLinked():
            return LinkIdentities(identities.user(data.user_id))
        case CreditsGranted():
            return GrantCredits(
                _owner(data, identities), data.credits, data.pool, data.expires_at, data.reason
            )
        case CreditsAdjusted():
            return AdjustCredits(_owner(data, identities), data.credits, data.reason)
        case UserMerged():
            source, target = identities.user(data.from_user_id), identities.user(data.to_user_id)
            return MergeAccounts(source, target, data.reason)
        case UserClosed():
            return CloseAccount(identities.user(data.user_id))
        case OrganizationUpdated():
            members = tuple(
                MemberTerms(identities.user(one.user_id), *_limit(one)) for one in data.members
            )
            return UpdateOrganisation(
                data.organization_id, data.mode, members, as_of=cause.occurred_at
            )
        case CreditsTransferred():
            sender, receiver = identities.user(data.from_user_id), identities.user(data.to_user_id)
            return TransferCredits(sender, receiver, data.credits, data.reason)
        case _:
            raise TypeError(f"{type(data).__name__} is not an account event")


def _limit(member: OrganizationMember) -> tuple[int | None, LimitPeriod | None]:
    """A limit without a period is for each month; a period without a limit is no limit."""
    if member.limit_credits is None:
        return None, None
    return member.limit_credits, member.period or "month"


def _links(data: Data, identities: Identities) -> tuple[Link, ...]:
    match data:
        case UserCreated():
            owner = identities.user(data.user_id)
            links = [
                link_of(provider, id_, owner, "user.created", identities)
                for provider, id_ in _named(data)
            ]
            return tuple(links)
        case UserLinked():
            owner = identities.user(data.user_id)
            ((provider, id_),) = _named(data)
            return (link_of(provider, id_, owner, "user.linked", identities),)
        case _:
            return ()


def _named(data: UserCreated | UserLinked) -> list[tuple[str, str]]:
    """Providers and ids as the mapping table writes them: providers and addresses are the same in capitals."""
    if isinstance(data, UserLinked):
        given = [(data.provider, data.external_id)]
    else:
        given = [*data.external_ids.items(), *([(EMAIL, data.email)] if data.email else ())]
    named = ((provider.lower(), id_) for provider, id_ in given)
    return [(provider, id_.lower() if provider == EMAIL else id_) for provider, id_ in named]


def link_of(
    provider: str, external_id: str, owner: str, resolved_by: str, identities: Identities
) -> Link:
    """A link; news of it may mean that the id was taken for a user of its own until now (R13). One that means somebody
    else already is not taken from him, unless as a user id: that mapping decides over all others.
    """
    itself = f"user:{external_id}"
    news = identities.external(provider, external_id) is None and provider not in NEVER_A_USER
    until_now = news and (provider == USER or identities.user(external_id) == itself)
    taken = until_now and itself != owner
    return Link(provider, external_id, owner, resolved_by, itself if taken else None)


def _external_ids(data: Data) -> tuple[str, ...]:
    """Every id that may stand in the mapping table: those named, and those that will be written."""
    match data:
        case UserCreated() | UserLinked():
            return (data.user_id, *(id_ for _, id_ in _named(data)))
        case CreditsGranted() | CreditsAdjusted():
            return (data.user_id,) if data.user_id else ()
        case CreditsTransferred() | UserMerged():
            return (data.from_user_id, data.to_user_id)
        case UserClosed():
            return (data.user_id,)
        case OrganizationUpdated():
            return tuple(member.user_id for member in data.members)
        case _:
            return ()
