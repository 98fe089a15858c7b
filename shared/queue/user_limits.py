"""How many jobs of a user a claim may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UserLimit:
    """A limit for one claim. Users without one are not limited.

    `user` is the key of `circuit_keys.user_key`. `first` jobs are taken in the order in which
    senders have waited; further jobs, up to `most`, only if no other user's job is left.
    """

    user: str
    first: int
    most: int
