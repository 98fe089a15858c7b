"""Forecasts when waiting mail will be sent, for all methods that return such a time.

`simulation` is pure; `backlog` reads its input from PostgreSQL; `forecasts` joins the two.
"""
