"""The changes of jobs: reading them in an order that skips none, and removing old ones."""
