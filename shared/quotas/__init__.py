"""Quotas: what one user may use, by default and by the override of an operator."""
