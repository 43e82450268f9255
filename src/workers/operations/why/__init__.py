"""Why a balance is what it is: the lots it consists of, what they were spent on, what is held, owed and expired.

Hides how the journal becomes sentences. Invariants: all of it is one snapshot (a repeatable-read transaction that
writes nothing); sums are made by the database, so that neither work nor answer grows beyond the limits of `journal.py`,
and what is left out is counted; every sum is held against another way to it, and what does not agree is a `Problem`.

For each lot: granted = elsewhere + remaining + spent + expired + clawed + moved. The lots together are the balance,
and the balance is what the last entry says. A past moment is explained from the journal alone.

`journal.py` reads (`journal.sql`), `doubts.py` finds what does not add up, `words.py` says what things are, `explanation.py`
puts the answer together (`answer.py`), `page.py` shows it to a person.
"""

from workers.operations.why.answer import LotSums, Why
from workers.operations.why.explanation import explain
from workers.operations.why.journal import StillToCome
from workers.operations.why.page import render

__all__ = ["LotSums", "StillToCome", "Why", "explain", "render"]
