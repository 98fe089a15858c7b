"""The audit: compares the mails that were sent with the promises of Outbox.

`installation` audits a whole installation, and `report` lists the broken promises. `sender` audits
one sender. `replay` and `jobs` do the comparison and are pure. All SQL is in `storage`.
"""
