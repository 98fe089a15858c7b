"""The client itself, written once with `async`; `_sync` is made from it."""
