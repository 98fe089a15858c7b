"""Finds processes with psutil, which allows for one that ends while it is looked at."""

from __future__ import annotations

import contextlib

import psutil


def alive(pid: int) -> bool:
    """Return whether a process has not ended. One that waits for its parent has."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def children(pid: int, *, recursive: bool = False) -> set[int]:
    """Return the children of a process, and theirs if `recursive`; none once it has ended."""
    try:
        return {child.pid for child in psutil.Process(pid).children(recursive=recursive)}
    except psutil.NoSuchProcess:
        return set()


def descendants(pid: int) -> set[int]:
    """Return all processes below a process; none once it has ended."""
    return children(pid, recursive=True)


def arguments_of(pid: int) -> list[str]:
    """Return the words that started a process; none once it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(psutil.Process(pid).cmdline())
    return []


def pid_of(module: str, among: set[int]) -> int:
    """Return the process that was started with a module or a file as one of its words.

    Raises:
        AssertionError: there is none.
    """
    for pid in among:
        if module in arguments_of(pid):
            return pid
    raise AssertionError(f"{module} is not among {among}")
