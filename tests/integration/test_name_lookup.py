"""Host names that users choose, resolved over real sockets."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from outbox_server.shared.egress import Egress, EgressRefused
from outbox_server.shared.name_lookup import AT_ONCE_PER_USER, LIMIT, MAX_ADDRESSES
from outbox_server.shared.smtp.endpoint import Endpoint
from outbox_server.shared.states import AttemptOutcome
from tests.dns_server import DnsServer
from tests.eventually import eventually
from tests.smtp_pools import endpoint_of, pool_of, send
from tests.smtp_servers import ScriptedServer
from tests.two_users import check_as_fast, p99

LOOPBACK = ["127.0.0.0/8"]
HOSTS = Path("/etc/hosts").read_text()
# Looks up the names on stdin, one a line.
LOOK_UP = """
import asyncio, sys
from outbox_server.shared.name_lookup import NameResolver

async def main():
    resolver = NameResolver()
    while name := (await asyncio.to_thread(sys.stdin.readline)).strip():
        try:
            print(*await resolver.addresses(name, "a"), flush=True)
        except OSError as error:
            print(error, flush=True)
    await resolver.close()

asyncio.run(main())
"""


async def refusal(lookup: Awaitable[Any]) -> str:
    with pytest.raises(OSError, match=r"cannot be resolved|operator's network") as caught:
        await lookup
    return str(caught.value)


async def test_a_name_has_addresses_of_both_families_ipv6_first(names: DnsServer) -> None:
    names.answers["both.test"] = ["192.0.2.1", "192.0.2.1", "2001:db8::1"]
    assert list(await names.resolver().addresses("both.test", "a")) == ["2001:db8::1", "192.0.2.1"]


async def test_an_address_is_not_looked_up(names: DnsServer) -> None:
    resolver = names.resolver()
    names.silent.add("127.0.0.1")
    assert list(await resolver.addresses("127.0.0.1", "a")) == ["127.0.0.1"]
    assert list(await resolver.addresses("2001:db8::1", "a")) == ["2001:db8::1"]
    assert names.asked("127.0.0.1", "A") == 0


async def test_a_missing_name_and_a_failing_server_are_told_apart(names: DnsServer) -> None:
    names.failing.add("failing.test")
    resolver = names.resolver()
    missing = await refusal(resolver.addresses("missing.test", "a"))
    assert missing == "missing.test cannot be resolved: the name has no address"
    failing = await refusal(resolver.addresses("failing.test", "a"))
    assert failing.startswith("failing.test cannot be resolved: its DNS servers give no answer")


@pytest.mark.parametrize(
    "name", ["a..test", "a" * 64 + ".test", ".".join(["a" * 60] * 5), "\u2028"]
)
async def test_a_text_that_is_not_a_host_name_is_refused_at_once(
    names: DnsServer, name: str
) -> None:
    assert "cannot be resolved" in await refusal(names.resolver().addresses(name, "a"))


async def test_the_hosts_file_comes_first(names: DnsServer) -> None:
    lines = [line.partition("#")[0].split() for line in HOSTS.splitlines()]
    own = {name: line[0] for line in lines if line for name in line[1:] if name != "localhost"}
    assert own, "/etc/hosts has no name of this machine"
    resolver = names.resolver()
    for name, address in own.items():
        names.answers[name] = ["192.0.2.8"]
        found = await resolver.addresses(name, "a")
        assert address in found
        assert "192.0.2.8" not in found
    assert set(await resolver.addresses("localhost", "a")) == {"::1", "127.0.0.1"}


async def test_resolv_conf_is_read_as_in_kubernetes_and_again_when_it_changes(
    names: DnsServer, tmp_path: Path
) -> None:
    """In a mount namespace of its own, where another file is /etc/resolv.conf."""
    names.answers |= {
        "relay.mail.svc.cluster.test": ["192.0.2.1"],
        "relay.other.svc.cluster.test": ["192.0.2.2"],
        "mx.example.test": ["192.0.2.3"],
        "relay.new.test": ["192.0.2.4"],
    }
    conf, mounted = tmp_path / "resolv.conf", "mount --bind $1 /etc/resolv.conf && shift && exec"
    server = f"nameserver [127.0.0.1]:{names.address.rpartition(':')[2]}\n"
    conf.write_text(f"{server}search mail.svc.cluster.test svc.cluster.test\noptions ndots:5\n")
    looking = await asyncio.create_subprocess_exec(
        *("unshare", "--mount", "--map-root-user", "sh", "-c", f'{mounted} "$@"', "sh", conf),
        *(sys.executable, "-c", LOOK_UP),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert looking.stdin is not None
    assert looking.stdout is not None

    async def look_up(name: str) -> str:
        assert looking.stdin is not None
        assert looking.stdout is not None
        looking.stdin.write(f"{name}\n".encode())
        return (await looking.stdout.readline()).decode().strip()

    assert await look_up("relay") == "192.0.2.1"
    assert await look_up("relay.other") == "192.0.2.2"
    assert await look_up("mx.example.test") == "192.0.2.3"
    # In place, as Docker does it.
    conf.write_text(f"{server}search new.test\n")
    assert await look_up("relay") == "192.0.2.4"
    looking.stdin.close()
    assert await looking.wait() == 0


async def test_a_slow_server_is_waited_for(names: DnsServer) -> None:
    """Also after fast ones, from which c-ares derives how long to wait."""
    names.answers |= {"fast.test": ["192.0.2.1"], "slow.test": ["192.0.2.2"]}
    names.slow["slow.test"] = 2.0
    resolver = names.resolver()
    for _ in range(20):
        await resolver.addresses("fast.test", "a")
    assert list(await resolver.addresses("slow.test", "a")) == ["192.0.2.2"]


async def test_a_lookup_at_a_silent_server_ends_within_the_limit(names: DnsServer) -> None:
    names.silent.add("silent.test")
    began = time.monotonic()
    found = await refusal(names.resolver(limit=timedelta(seconds=1)).addresses("silent.test", "a"))
    assert found == "silent.test cannot be resolved: no answer within 1 s"
    # The promised bound, and a busy machine.
    assert time.monotonic() - began < LIMIT.total_seconds()


async def test_an_answer_to_another_question_is_not_used(names: DnsServer) -> None:
    names.answers["forged.test"] = ["192.0.2.1"]
    names.forged.add("forged.test")
    resolver = names.resolver(limit=timedelta(seconds=1))
    assert "cannot be resolved" in await refusal(resolver.addresses("forged.test", "a"))


async def test_a_long_answer_comes_over_tcp_and_few_addresses_are_used(names: DnsServer) -> None:
    many = [f"10.0.{index // 250}.{index % 250}" for index in range(1_000)]
    names.answers["many.test"] = [*many, *(f"2001:db8::{index:x}" for index in range(1_000))]
    found = await names.resolver().addresses("many.test", "a")
    assert names.over_tcp == 2
    assert len(found) == MAX_ADDRESSES
    assert sum(":" in address for address in found) == MAX_ADDRESSES // 2


async def test_aliases_are_followed_and_loops_end(names: DnsServer) -> None:
    names.aliases |= {"alias.test": "target.test", "one.test": "two.test", "two.test": "one.test"}
    names.answers["target.test"] = ["192.0.2.1"]
    resolver = names.resolver()
    assert list(await resolver.addresses("alias.test", "a")) == ["192.0.2.1"]
    assert "cannot be resolved" in await refusal(resolver.addresses("one.test", "a"))


async def test_private_answers_are_refused_and_the_others_are_used(names: DnsServer) -> None:
    names.answers |= {
        "private.test": ["10.1.2.3", "127.0.0.1", "169.254.169.254", "::1", "::ffff:10.0.0.1"],
        "mixed.test": ["10.1.2.3", "93.184.215.14", "fd00::1"],
    }
    names.aliases["alias.test"] = "private.test"
    egress = Egress(resolver=names.resolver())
    for name in ("private.test", "alias.test"):
        with pytest.raises(EgressRefused) as caught:
            await egress.permitted_addresses(name, user="a")
        assert "10.1" not in str(caught.value)
    assert await egress.permitted_addresses("mixed.test", user="a") == ["93.184.215.14"]


async def test_more_lookups_of_a_user_wait_for_a_place(names: DnsServer) -> None:
    silent = [f"silent-{index}.test" for index in range(3 * AT_ONCE_PER_USER)]
    names.silent |= set(silent)
    names.answers["good.test"] = ["192.0.2.1"]
    resolver = names.resolver()
    lookups = [asyncio.create_task(resolver.addresses(name, "a")) for name in silent]
    await eventually(lambda: names.asked(silent[AT_ONCE_PER_USER - 1], "A") > 0)
    # Another user does not wait.
    assert list(await resolver.addresses("good.test", "b")) == ["192.0.2.1"]
    assert [name for name in silent if names.asked(name, "A")] == silent[:AT_ONCE_PER_USER]
    for lookup in lookups:
        lookup.cancel()
    await asyncio.gather(*lookups, return_exceptions=True)


async def test_many_lookups_use_several_channels_one_after_the_other(names: DnsServer) -> None:
    """Also while a look-up on an earlier channel is under way, which ends as if alone."""
    names.answers |= {"good.test": ["192.0.2.1"], "slow.test": ["192.0.2.2"]}
    names.slow["slow.test"] = 0.5
    resolver = names.resolver()
    slow = asyncio.create_task(resolver.addresses("slow.test", "a"))
    for _ in range(150):
        assert list(await resolver.addresses("good.test", "b")) == ["192.0.2.1"]
    assert list(await slow) == ["192.0.2.2"]


async def test_silent_names_of_one_user_do_not_delay_the_mail_of_another(names: DnsServer) -> None:
    names.silent |= {f"silent-{index}.test" for index in range(40)}
    names.answers["good.test"] = ["127.0.0.1"]
    pool = pool_of(timeout=30.0, egress=Egress(LOOPBACK, names.resolver()))
    async with ScriptedServer() as server:
        good = endpoint_of(server, host="good.test", chosen_by="victim")
        hostile: list[Endpoint] = [
            endpoint_of(server, host=name, chosen_by="hostile") for name in sorted(names.silent)
        ]

        async def sent() -> None:
            result = await send(pool, good)
            assert result.outcome is AttemptOutcome.SENT, result.message
            await pool.close()  # so that the next mail looks the name up again

        quiet = await p99(sent, 10)
        sends = [asyncio.create_task(send(pool, each)) for each in hostile]
        await eventually(lambda: sum(names.asked(each.host, "A") > 0 for each in hostile) >= 4)
        await check_as_fast(sent, quiet, 10)
        # Each with a look-up of its own, before the first silent name was given up.
        assert names.asked("good.test", "A") >= 20
        assert not any(task.done() for task in sends)
        for task in sends:
            task.cancel()
        await asyncio.gather(*sends, return_exceptions=True)
    await pool.close()


async def test_a_cancelled_lookup_frees_its_place(names: DnsServer) -> None:
    names.silent.add("silent.test")
    names.answers["good.test"] = ["192.0.2.1"]
    resolver = names.resolver(at_once=1)
    task = asyncio.create_task(resolver.addresses("silent.test", "a"))
    await eventually(lambda: names.asked("silent.test", "A") > 0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert list(await resolver.addresses("good.test", "a")) == ["192.0.2.1"]
