"""The former home of `raise_if_cancelled`, for callers that are not changed yet."""

from shared.loops import raise_if_cancelled

__all__ = ["raise_if_cancelled"]
