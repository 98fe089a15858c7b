"""URLs of a Redis Cluster, and the slots of the keys of a shard."""

from __future__ import annotations

import re
from pathlib import Path

from redis.crc import key_slot

from outbox_server.shared.queue.cluster import parse_cluster_url
from outbox_server.shared.queue.keys import ShardKeys
from outbox_server.shared.queue.scripts import SCRIPTS, read_script

LUA = Path(__file__).parents[2] / "shared" / "queue" / "lua"


def test_all_parts_of_a_url_are_read() -> None:
    found = parse_cluster_url("rediss+cluster://app:p%40ss@one:7000,two,[::1]:7/0?ssl_ca_certs=/ca")
    assert found.hosts == (("one", 7000), ("two", 6379), ("::1", 7))
    assert found.login == {"username": "app", "password": "p@ss"}
    assert found.tls == {"ssl": True, "ssl_ca_certs": "/ca"}
    assert "p@ss" not in repr(found)


def test_a_host_alone_is_enough() -> None:
    found = parse_cluster_url("redis+cluster://one")
    assert (found.hosts, found.login, found.tls) == ((("one", 6379),), {}, {})


def test_all_keys_of_a_shard_are_in_one_slot_and_shards_are_in_several() -> None:
    slots = set()
    for shard in range(12):
        (slot,) = {key_slot(key.encode()) for key in vars(ShardKeys(shard)).values()}
        slots.add(slot * 3 // 16_384)
    assert slots == {0, 1, 2}


def test_scripts_build_all_keys_from_the_prefix_of_the_shard() -> None:
    literal = re.compile(r"redis\.p?call\('(?!INFO')\w+', *'")
    for name in SCRIPTS:
        text = read_script(name)
        assert "local prefix = string.match(KEYS[1]" in text, name
        assert not literal.search(text), name
    # Only these two files build a key.
    for path in LUA.rglob("*.lua"):
        if path.name not in ("keys.lua", "life.lua"):
            assert "prefix .." not in path.read_text(encoding="utf-8"), path


def test_the_health_check_uses_every_command_that_scripts_use() -> None:
    command = re.compile(r"redis\.p?call\(\s*'(\w+)'")
    used = {
        found
        for path in LUA.rglob("*.lua")
        for found in command.findall(path.read_text(encoding="utf-8"))
    }
    assert {*command.findall(read_script("serves"))} == used
