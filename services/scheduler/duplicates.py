"""Which addresses were seen before: exact, in bounded memory, whatever the size of the upload."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from types import TracebackType
from typing import Self

# Pages beyond this go to an unnamed file that the system removes with the process.
_CACHE_KIB = 16 * 1024


class DuplicateFinder:
    """A set of keys in a temporary SQLite database. A context manager; for one thread at a time."""

    def __init__(self, cache_kib: int = _CACHE_KIB) -> None:
        # The thread may change between blocks (a pool), never within one.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        # Nothing of it outlives the upload, so nothing needs to be safe on disk.
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._database.execute(f"PRAGMA cache_size = -{cache_kib}")
        # `block` tells what a block has just put in from what was there.
        self._database.execute(
            "CREATE TABLE keys (key TEXT PRIMARY KEY, block INTEGER) WITHOUT ROWID"
        )
        self._block = 0

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
        self._database.close()

    def new_in_block(self, keys: Sequence[str]) -> list[bool]:
        """Return for each key whether it is its first occurrence, in this block and all before.

        The keys are remembered.
        """
        distinct = set(keys)
        known = self._add(distinct)
        if len(distinct) == len(keys) and not known:
            return [True] * len(keys)
        marks = []
        for key in keys:
            marks.append(key not in known)
            known.add(key)
        return marks

    def _add(self, distinct: set[str]) -> set[str]:
        """Remember keys; return those that were there before."""
        self._block += 1
        before = self._database.total_changes
        execute = self._database.execute
        execute("BEGIN")
        # Ascending keys meet the same pages of the tree one after the other.
        self._database.executemany(
            "INSERT OR IGNORE INTO keys VALUES (?, ?)",
            [(key, self._block) for key in sorted(distinct)],
        )
        execute("COMMIT")
        if self._database.total_changes - before == len(distinct):
            return set()
        is_old = "SELECT 1 FROM keys WHERE key = ? AND block < ?"
        return {key for key in distinct if execute(is_old, (key, self._block)).fetchone()}
