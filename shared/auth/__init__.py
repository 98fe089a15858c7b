"""API keys: their form, their store, and how a call is authenticated by one."""
