"""The rivals from PyPI. They run in an environment of their own (bench/rivals/installing.py)."""
