"""The cooldown of a sender whose account was refused: its record, and its columns."""
