"""All data that Outbox keeps in Redis: heads, limiters and circuits of senders.

Redis is disposable: all of this is rebuilt from PostgreSQL (`shared.heads.loader`).
"""
