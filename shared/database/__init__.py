"""PostgreSQL: the engine, the tables, the migrations, and conditions that statements share."""
