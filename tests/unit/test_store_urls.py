"""The URLs of the stores: malformed ones are named in one line, which has no part of a secret."""

from __future__ import annotations

import pytest

from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.queue.connection import connect
from outbox_server.shared.settings import load_settings
from outbox_server.shared.store_urls import place_of
from outbox_server.shared.unknown_settings import unknown_settings

SECRET = "hunter2-is-secret"


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("DATABASE_URL", f"outbox:{SECRET}@db:5432/outbox"),
        ("DATABASE_URL", f"mysql://outbox:{SECRET}@db/outbox"),
        ("DATABASE_URL", f"postgresql:/outbox:{SECRET}@db/outbox"),
        ("DATABASE_URL", f"postgresql://outbox:{SECRET}@db:54a2/outbox"),
        ("DATABASE_URL", f"postgresql://outbox:{SECRET}@db:70000/outbox"),
        ("DATABASE_URL", f"postgresql://outbox:{SECRET}@db1:5432,db2:5432:1/outbox"),
        ("DATABASE_URL", f"postgresql://outbox:{SECRET}/x@db:5432/outbox"),
        ("DATABASE_URL", f"postgresql://outbox:{SECRET}#x@db:5432/outbox"),
        ("DATABASE_URL", f"postgresql://outbox:{SECRET}@" + "db," * 30 + "db/outbox"),
        ("DATABASE_URL", ""),
        ("REDIS_URL", f":{SECRET}@cache:6379/0"),
        ("REDIS_URL", f"http://:{SECRET}@cache:6379/0"),
        ("REDIS_URL", f"redis://:{SECRET}@cache:63a79/0"),
        ("REDIS_URL", f"redis://:{SECRET}@cache:0/0"),
        ("REDIS_URL", f"redis://:{SECRET}@cache:6379/zero"),
        ("REDIS_URL", f"redis://:{SECRET}@[::1:6379/0"),
        ("REDIS_URL", f"redis://:{SECRET}@cache/0?db=x&password={SECRET}"),
        ("REDIS_URL", f"redis://:{SECRET}@cache/0?sokket_timeout=1"),
        ("REDIS_URL", f"redis+cluster://:{SECRET}@n1:6379,n2:x/0"),
        ("REDIS_URL", f"redis+cluster://:{SECRET}@n1:6379/1"),
        ("REDIS_URL", f"redis+cluster://:{SECRET}@n1:6379?db=0&password={SECRET}"),
        ("REDIS_URL", f"redis+cluster://:{SECRET}@n1?ssl_ca_certs=/ca.crt"),
        ("REDIS_URL", f"redis+cluster://:{SECRET}@"),
        ("REDIS_URL", f"redis+cluster://:{SECRET}@" + "n," * 30 + "n"),
        ("REDIS_URL", f"cluster+redis://:{SECRET}@n1"),
    ],
)
def test_a_malformed_url_is_named_in_one_line_without_its_secret(
    monkeypatch: pytest.MonkeyPatch, name: str, url: str
) -> None:
    monkeypatch.setenv(f"OUTBOX_{name}", url)
    with pytest.raises(ConfigurationError) as caught:
        connect(load_settings())
    text = caught.value.message
    assert text.startswith(f"OUTBOX_{name}: ")
    assert "\n" not in text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    ("url", "place"),
    [
        (f"postgresql://outbox:{SECRET}@db:5432/outbox?sslmode=require", "db:5432/outbox"),
        (f"postgres://outbox:{SECRET}@db1:5432,db2:5433/outbox", "db1:5432,db2:5433/outbox"),
        (f"postgresql://outbox:{SECRET}@[fd00::1]:5432/outbox", "[fd00::1]:5432/outbox"),
        ("postgresql+psycopg://outbox@db/outbox", "db/outbox"),
        ("postgresql:///outbox?host=/var/run/postgresql", "/outbox"),
        (f"redis://:{SECRET}@cache:6379/0", "cache:6379/0"),
        (f"rediss://ann:{SECRET}@cache", "cache"),
        ("unix:///run/valkey.sock?db=0", "/run/valkey.sock"),
        (f"redis+sentinel://:{SECRET}@s1:26379,s2:26379/main/0", "s1:26379,s2:26379/main/0"),
        (f"redis+cluster://:{SECRET}@n1:6379,n2:6379", "n1:6379,n2:6379"),
    ],
)
def test_the_place_of_a_url_is_its_hosts_and_its_path(url: str, place: str) -> None:
    name = "redis_url" if url.startswith(("redis", "unix")) else "database_url"
    assert getattr(load_settings(**{name: url}), name) == url
    assert place_of(url) == place


def test_an_unknown_name_is_reported_with_the_closest_known_one() -> None:
    (keys, odd, shards) = unknown_settings(
        ["OUTBOX_SHARD", "OUTBOX_ENCRYPTION_KEY_FILE", "OUTBOX_QQQQ", "PATH"]
    )
    assert shards == "OUTBOX_SHARD is set, but is not a setting; did you mean OUTBOX_SHARDS?"
    assert keys.endswith("did you mean OUTBOX_ENCRYPTION_KEYS_FILE?")
    assert odd == "OUTBOX_QQQQ is set, but is not a setting"


def test_settings_and_variables_of_platforms_are_not_unknown() -> None:
    names = ["outbox_shards", "OUTBOX_API_KEY_FILE", "OUTBOX_TEST_STORES"]
    names += ["OUTBOX_SCHEDULER_SERVICE_HOST", "OUTBOX_SCHEDULER_PORT"]
    names += ["OUTBOX_SCHEDULER_PORT_50051_TCP_ADDR", "OUTBOX_SCHEDULER_SERVICE_PORT_GRPC"]
    assert unknown_settings(names) == []
