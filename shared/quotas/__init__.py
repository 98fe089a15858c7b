"""Quotas: the maximum that one user may have, by default or by an operator's override."""
