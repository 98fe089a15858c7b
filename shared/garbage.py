"""Keeps garbage collections short: a full one stops all threads of a process.

A service has some 70,000 objects that are never garbage, such as compiled statements and what its
libraries cache. Most are created by its first calls. A full collection examines all of them, in 15
to 25 ms, and is due every few seconds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from typing import Any, Final

# What is left after a full collection that took this long, in seconds, is excluded from later ones.
_LONG_S: Final = 0.003
# How often, at most: excluded objects that refer to each other are not freed any more.
_MOST: Final = 20
_FULL: Final = 2


class ShortCollections:
    """Excludes objects that stay from garbage collections."""

    def __init__(self) -> None:
        self._began = 0.0
        self._left = _MOST

    def start(self) -> None:
        """Exclude all objects of now, which are imported modules, and begin to watch."""
        gc.freeze()
        gc.callbacks.append(self._watch)

    def _watch(self, phase: str, info: Mapping[str, Any]) -> None:
        if info["generation"] != _FULL:
            return
        if phase == "start":
            self._began = time.thread_time()
        elif time.thread_time() - self._began >= _LONG_S:
            gc.freeze()
            self._left -= 1
            if not self._left:
                gc.callbacks.remove(self._watch)
