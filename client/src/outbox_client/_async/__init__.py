"""The client, written once with `async`. `_sync` is generated from it."""
