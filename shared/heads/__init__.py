"""Loads the first waiting jobs of each sender from PostgreSQL into Redis."""
