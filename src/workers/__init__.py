"""The service that owns every credit balance: events in, one atomic transaction, credit.changed out."""
