"""API keys: their format, their store, and the authentication of calls."""
