"""The real consumer, ledger, store and relay on real PostgreSQL, with deaths and faults at every boundary."""
