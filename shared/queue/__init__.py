"""All that Outbox keeps in Redis: each sender's head, its limiter, and when to look at it next.

Redis is disposable: everything here is worked out from PostgreSQL (`shared.heads.loader`).
"""
