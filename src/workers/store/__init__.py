"""PostgreSQL: what a batch touches is locked and loaded, what it did is written, what is to be told is kept.

Invariants: the number of statements of a batch does not depend on its size; every writer locks in one order
(parked messages, accounts by id, then everything of theirs); all statements are constants of `queries.sql`.
"""
