"""What crosses the wire: strict in, exact out, and schemas that say the same as the models."""
