"""All SQL of the scheduler, one module per group of tables."""
