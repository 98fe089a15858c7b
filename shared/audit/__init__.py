"""The audit: compares what was sent with what was promised.

`installation` audits a whole installation, and `report` says which promises were broken; `sender`
audits one sender. `replay` and `jobs` judge and are pure. All SQL is in `storage`.
"""
