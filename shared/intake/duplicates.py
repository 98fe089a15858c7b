"""Finds duplicate addresses exactly, in bounded memory, whatever the size of the upload."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from types import TracebackType
from typing import Self

# The memory of the cache. Further pages go to an unnamed file, which the system deletes when the
# process ends.
_CACHE_KIB = 16 * 1024


class DuplicateFinder:
    """A set of keys in a temporary SQLite database, for one thread at a time.

    The database is opened for the second block: most batches have only one.
    """

    def __init__(self, cache_kib: int = _CACHE_KIB) -> None:
        self._cache_kib = cache_kib
        self._first: set[str] | None = None
        self._opened: sqlite3.Connection | None = None
        self._block = 0

    @property
    def _database(self) -> sqlite3.Connection:
        if self._opened is None:
            self._opened = _open(self._cache_kib)
        return self._opened

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget all keys."""
        if self._opened is not None:
            self._opened.close()

    def new_in_block(self, keys: Sequence[str]) -> list[bool]:
        """Return for each key whether it occurs for the first time, and remember it.

        Keys of this block and of all earlier blocks count.
        """
        distinct = set(keys)
        if self._first is None:
            self._first = distinct
            known = set[str]()
        else:
            if self._opened is None:
                self._add(self._first)
                self._first = set()
            known = self._add(distinct)
        if len(distinct) == len(keys) and not known:
            return [True] * len(keys)
        marks = []
        for key in keys:
            marks.append(key not in known)
            known.add(key)
        return marks

    def _add(self, distinct: set[str]) -> set[str]:
        """Remember keys. Return those that earlier blocks have added."""
        self._block += 1
        before = self._database.total_changes
        execute = self._database.execute
        execute("BEGIN")
        # In ascending order, so that consecutive keys are on the same pages of the tree.
        self._database.executemany(
            "INSERT OR IGNORE INTO keys VALUES (?, ?)",
            [(key, self._block) for key in sorted(distinct)],
        )
        execute("COMMIT")
        if self._database.total_changes - before == len(distinct):
            return set()
        is_old = "SELECT 1 FROM keys WHERE key = ? AND block < ?"
        return {key for key in distinct if execute(is_old, (key, self._block)).fetchone()}


def _open(cache_kib: int) -> sqlite3.Connection:
    # Blocks may run in different threads of a pool, but never two at once.
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    # The database is deleted after the upload, so it needs no durability.
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    database.execute("PRAGMA locking_mode = EXCLUSIVE")
    database.execute(f"PRAGMA cache_size = -{cache_kib}")
    # `block` distinguishes the keys of the present block from earlier ones.
    database.execute("CREATE TABLE keys (key TEXT PRIMARY KEY, block INTEGER) WITHOUT ROWID")
    return database
