"""The whole service through its public doors, over real Kafka and real PostgreSQL."""
