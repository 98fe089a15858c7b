"""When waiting mail will be sent: one arithmetic for every answer that names a time.

`simulation` is pure; `backlog` reads what it needs from PostgreSQL; `forecasts` joins them.
"""
