"""PostgreSQL: the engine, the tables, migrations, and conditions that statements share."""
