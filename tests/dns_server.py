"""A DNS server on loopback, over UDP and TCP, that can be silent, slow, or lie."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Final, Self

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

from outbox_server.shared.name_lookup import AT_ONCE_PER_USER, LIMIT, NameResolver

# No answer is kept, so that each look-up asks.
_TTL: Final = 0
# The largest answer over UDP. A larger one is truncated, and asked for again over TCP.
_UDP_BYTES: Final = 1_200
_TCP_BYTES: Final = 65_535


class DnsServer:
    """Answers for the names in `answers`; all others do not exist.

    The addresses of a name are a list, or a list of lists, one for each question in turn. Names in
    `silent` get no answer. Those in `slow` get none until these seconds after the first
    question, as from a server that asks others and keeps the answer.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Sequence[str] | list[list[str]]] = {}
        # Aliases (CNAME) by name.
        self.aliases: dict[str, str] = {}
        self.silent: set[str] = set()
        self.slow: dict[str, float] = {}
        # Names whose answers have another question, as forged answers would.
        self.forged: set[str] = set()
        # Names for which the server answers with an error.
        self.failing: set[str] = set()
        self.over_tcp = 0
        self._questions: Counter[tuple[str, str]] = Counter()
        self._first: dict[tuple[str, str], float] = {}
        self._resolvers: list[NameResolver] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._udp: asyncio.DatagramTransport | None = None
        self._tcp: asyncio.Server | None = None

    def resolver(
        self, *, limit: timedelta = LIMIT, at_once: int = AT_ONCE_PER_USER
    ) -> NameResolver:
        """Return a resolver that asks this server. It ends with the server."""
        made = NameResolver(limit=limit, at_once=at_once, servers=[self.address])
        self._resolvers.append(made)
        return made

    def asked(self, name: str, kind: str) -> int:
        """Return how often the addresses of a name were asked for; `kind` is A or AAAA."""
        return self._questions[(name, kind)]

    @property
    def address(self) -> str:
        """Return `address:port` of the server."""
        assert self._tcp is not None
        return f"127.0.0.1:{self._tcp.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._tcp = await asyncio.start_server(self._serve_tcp, "127.0.0.1", 0)
        port = self._tcp.sockets[0].getsockname()[1]
        self._udp, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: _Udp(self), local_addr=("127.0.0.1", port)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._tcp is not None
        assert self._udp is not None
        for resolver in self._resolvers:
            await resolver.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._udp.close()
        self._tcp.close()
        for writer in self._writers:
            writer.close()
        await self._tcp.wait_closed()

    def take_datagram(self, data: bytes, address: tuple[str, int]) -> None:
        """Answer a question that arrived over UDP."""

        async def answer() -> None:
            found = await self._answer(data)
            if found is not None and self._udp is not None:
                wire = found.to_wire(max_size=_TCP_BYTES)
                if len(wire) > _UDP_BYTES:
                    found.answer.clear()
                    found.flags |= dns.flags.TC
                    wire = found.to_wire()
                self._udp.sendto(wire, address)

        task = asyncio.create_task(answer())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                size = int.from_bytes(await reader.readexactly(2))
                found = await self._answer(await reader.readexactly(size))
                self.over_tcp += 1
                if found is not None:
                    wire = found.to_wire(max_size=_TCP_BYTES)
                    writer.write(len(wire).to_bytes(2) + wire)
        writer.close()

    async def _answer(self, data: bytes) -> dns.message.Message | None:
        query = dns.message.from_wire(data)
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True).lower()
        kind = dns.rdatatype.to_text(question.rdtype)
        self._questions[(name, kind)] += 1
        if name in self.silent:
            return None
        now = asyncio.get_running_loop().time()
        ready = self._first.setdefault((name, kind), now) + self.slow.get(name, 0)
        await asyncio.sleep(max(ready - now, 0))
        answer = dns.message.make_response(query)
        if name in self.forged:
            answer.question[0] = dns.rrset.RRset(
                dns.name.from_text("other.test"), question.rdclass, question.rdtype
            )
        if name in self.failing:
            answer.set_rcode(dns.rcode.SERVFAIL)
            return answer
        passed: set[str] = set()
        while name in self.aliases and name not in passed:
            passed.add(name)
            alias = self.aliases[name]
            answer.answer.append(dns.rrset.from_text(f"{name}.", _TTL, "IN", "CNAME", f"{alias}."))
            name = alias
        if name not in self.answers and not passed:
            answer.set_rcode(dns.rcode.NXDOMAIN)
            return answer
        addresses = [
            each for each in self._addresses(name, kind) if (":" in each) == (kind == "AAAA")
        ]
        if addresses:
            answer.answer.append(dns.rrset.from_text(f"{name}.", _TTL, "IN", kind, *addresses))
        return answer

    def _addresses(self, name: str, kind: str) -> Sequence[str]:
        given = self.answers.get(name, ())
        if not given or isinstance(given[0], str):
            return given  # type: ignore[return-value]
        turn = min(self._questions[(name, kind)], len(given)) - 1
        return given[turn]


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._server.take_datagram(data, addr)
