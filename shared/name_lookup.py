"""Resolves the host names that users choose. No name can delay the names of other users.

The system's resolver blocks one thread per name, and uvloop has four threads. c-ares has one thread
for all names and never blocks it. It reads /etc/hosts, and /etc/resolv.conf with its search domains
and options, as the system's resolver does. It keeps answers for their time to
live. Names of the operator (PostgreSQL, Redis, OUTBOX_SMTP_URL) are left to the system's resolver,
which no user can slow down.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import aiodns
import pycares

# Limit of a look-up, including the wait until fewer look-ups of the same user are under way.
LIMIT: Final = timedelta(seconds=5)
# The look-ups of one user at a time. Further ones wait for look-ups of the same user only.
AT_ONCE_PER_USER: Final = 8
# How many addresses of a name are used. A name may have thousands, all of which could be tried.
MAX_ADDRESSES: Final = 16
_RESOLV_CONF: Final = Path("/etc/resolv.conf")
# The wait for the first reply, before c-ares knows how fast the servers are, and the number of
# tries. Each try waits twice as long as the one before it.
_FIRST_WAIT_S: Final = 2.0
_TRIES: Final = 5
# The number of look-ups of one channel, which is then replaced. c-ares caches any number of
# answers, and pycares cannot turn that off, so a user with many large answers could fill the
# memory.
_LOOK_UPS_PER_CHANNEL: Final = 64
# Errors that say that the name has no address. All others may be temporary.
_NO_SUCH_NAME: Final = (pycares.errno.ARES_ENOTFOUND, pycares.errno.ARES_ENODATA)
# ARES_AI_NOSORT, which pycares has no name for. The sorting opens a socket for each address.
_NO_SORT: Final = 1 << 7


class NameResolver:
    """Resolves names by c-ares, for one event loop."""

    def __init__(
        self,
        *,
        limit: timedelta = LIMIT,
        at_once: int = AT_ONCE_PER_USER,
        servers: Sequence[str] = (),
    ) -> None:
        """`at_once` is the number of look-ups that one user may have under way.

        `servers` (`address:port`) take the place of those in /etc/resolv.conf.
        """
        self._limit = limit.total_seconds()
        self._at_once = at_once
        self._servers = servers
        self._current: _Channel | None = None
        # Channels that were replaced, until their last look-up ends.
        self._older: set[_Channel] = set()
        self._places: dict[str, _LookupPlaces] = {}

    async def addresses(self, host: str, user: str) -> Sequence[str]:
        """Return the addresses of `host`, which `user` chose: IPv6 first, without duplicates.

        Raises:
            OSError: the name does not exist, has no address, or the answer did not arrive in time.
        """
        if _is_address(host):
            return (host,)
        try:
            async with asyncio.timeout(self._limit), self._place(user):
                return await self._look_up(host)
        except TimeoutError:
            raise OSError(
                f"{host} cannot be resolved: no answer within {self._limit:g} s"
            ) from None

    async def close(self) -> None:
        """End the look-ups that are under way."""
        channels = {*self._older} | ({self._current} if self._current else set())
        self._current = None
        self._older.clear()
        for channel in channels:
            await channel.resolver.close()

    async def _look_up(self, host: str) -> Sequence[str]:
        channel = self._channel()
        channel.begun += 1
        channel.under_way += 1
        try:
            found = await channel.resolver.getaddrinfo(
                host, type=socket.SOCK_STREAM, flags=_NO_SORT
            )
        except aiodns.error.DNSError as error:
            number = error.args[0]
            why = (
                "the name has no address"
                if number in _NO_SUCH_NAME
                else f"its DNS servers give no answer ({_text_of(number)})"
            )
            raise OSError(f"{host} cannot be resolved: {why}") from None
        except UnicodeError:
            raise OSError(f"{host} cannot be resolved: it is not a host name") from None
        finally:
            channel.under_way -= 1
            if channel in self._older and not channel.under_way:
                self._older.discard(channel)
                await channel.resolver.close()
        return _in_order(found)

    def _channel(self) -> _Channel:
        """Return a channel that has read the current resolv.conf and may do one more look-up."""
        loop, state = asyncio.get_running_loop(), _state_of(_RESOLV_CONF)
        current = self._current
        if (
            current is not None
            and (current.resolver.loop, current.read) == (loop, state)
            and current.begun < _LOOK_UPS_PER_CHANNEL
        ):
            return current
        if current is not None and current.under_way:
            self._older.add(current)
        resolver = aiodns.DNSResolver(self._servers, loop, timeout=_FIRST_WAIT_S, tries=_TRIES)
        self._current = _Channel(resolver, state)
        return self._current

    @asynccontextmanager
    async def _place(self, user: str) -> AsyncIterator[None]:
        places = self._places.setdefault(user, _LookupPlaces(asyncio.Semaphore(self._at_once)))
        places.wanted += 1
        try:
            async with places.free:
                yield
        finally:
            places.wanted -= 1
            if not places.wanted:
                del self._places[user]


@dataclass(eq=False, slots=True)
class _Channel:
    resolver: aiodns.DNSResolver
    # The state of resolv.conf when it was read.
    read: tuple[int, ...]
    begun: int = 0
    under_way: int = 0


@dataclass(eq=False, slots=True)
class _LookupPlaces:
    free: asyncio.Semaphore
    # The look-ups that have a place or wait for one.
    wanted: int = 0


def _text_of(number: int) -> str:
    text = pycares.errno.strerror(number)
    return text.decode() if isinstance(text, bytes) else text


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _state_of(file: Path) -> tuple[int, ...]:
    try:
        found = os.stat(file)  # noqa: PTH116 - a Path's stat takes three times as long
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_ino, found.st_size)


def _in_order(found: pycares.AddrInfoResult) -> Sequence[str]:
    """Return IPv6 addresses first, and some of both families: one of them may be unreachable."""
    by_family: dict[int, dict[str, None]] = {socket.AF_INET6: {}, socket.AF_INET: {}}
    for node in found.nodes:
        of_family = by_family.get(node.family)
        if of_family is not None and len(of_family) < MAX_ADDRESSES // 2:
            of_family[node.addr[0].decode("ascii")] = None
    return [address for addresses in by_family.values() for address in addresses]
