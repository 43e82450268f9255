"""PostgreSQL's part of the ledger's promises, on a real server, without Kafka."""
