"""All SQL of the scheduler, a module a group of tables."""
