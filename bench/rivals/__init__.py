"""What others would choose instead of Outbox, on the same work."""
