"""Processor time and memory of a process and all its children, from /proc."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_TICKS: Final = os.sysconf("SC_CLK_TCK")


def _stats() -> dict[int, list[str]]:
    """Return the fields of /proc/PID/stat after the name, by process."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found[int(folder.name)] = text.rpartition(")")[2].split()
    return found


def _trees(pids: Mapping[str, int], stats: Mapping[int, list[str]]) -> dict[str, list[int]]:
    children = defaultdict(list)
    for pid, fields in stats.items():
        children[int(fields[1])].append(pid)
    trees = {}
    for name, root in pids.items():
        tree, pending = [], [root]
        while pending:
            pid = pending.pop()
            if pid in stats:
                tree.append(pid)
                pending += children[pid]
        trees[name] = tree
    return trees


def processor_seconds(pids: Mapping[str, int]) -> dict[str, float]:
    """Return the seconds that each process and its children have used, ended children included."""
    stats = _stats()
    # User and system time of the process, and of its children that have ended.
    return {
        name: sum(sum(map(int, stats[pid][11:15])) for pid in tree) / _TICKS
        for name, tree in _trees(pids, stats).items()
    }


def memory_mib(pids: Mapping[str, int]) -> dict[str, float]:
    """Return the memory of each process and its children; shared pages are divided (PSS)."""
    found = {}
    for name, tree in _trees(pids, _stats()).items():
        total = 0
        for pid in tree:
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
            except OSError:
                continue
            total += sum(
                int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")
            )
        found[name] = total / 1024
    return found
