"""The money rules, pure: a snapshot, commands and a time in; outcomes, entries and new state out.

Nothing here does I/O, reads a clock, draws a random number or writes a log; time and ids are arguments. Two
words carry the rest: `execute` folds a batch of commands in order, each seeing the effects of those before it,
and `Writer.write` is the only place where a balance changes.
"""

from workers.ledger.execute import Execution, execute
from workers.ledger.model import Account, Booking, Entry, Generation, Lot, Purchase, Snapshot

__all__ = [
    "Account",
    "Booking",
    "Entry",
    "Execution",
    "Generation",
    "Lot",
    "Purchase",
    "Snapshot",
    "execute",
]
