"""Benchmarks: `make bench`."""

import os

# grpc reads this at import: none of the servers that a benchmark starts uses the parent's grpc.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
