"""The drill: runs a private stack under load and injects random faults, planned from a seed."""
