from __future__ import annotations

import ssl

import pytest

from outbox_server.shared.egress import Egress, reason_of
from outbox_server.shared.errors import ConfigurationError

INSIDE = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.168.1.1",
    "198.18.0.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "fc00::1",
    "fd00:ec2::254",
    "ff02::1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "3fff::1",
    # IPv4 in IPv6: mapped, NAT64, NAT64 for local use, 6to4.
    "::ffff:127.0.0.1",
    "::ffff:10.1.2.3",
    "::ffff:169.254.169.254",
    "64:ff9b::127.0.0.1",
    "64:ff9b::10.1.2.3",
    "64:ff9b:1::8.8.8.8",
    "2002:7f00:1::1",
    "2002:a01:203::1",
]
OUTSIDE = [
    "8.8.8.8",
    "100.63.255.255",
    "100.128.0.1",
    "172.15.0.1",
    "172.32.0.1",
    "193.0.0.1",
    "2606:4700::1111",
    "2a00:1450::1",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
]


@pytest.mark.parametrize("address", INSIDE)
def test_internal_addresses_are_refused(address: str) -> None:
    assert not Egress().allows("mail.example.com", address)


@pytest.mark.parametrize("address", OUTSIDE)
def test_public_addresses_are_allowed(address: str) -> None:
    assert Egress().allows("mail.example.com", address)


def test_the_operator_may_allow_networks_addresses_and_hosts() -> None:
    egress = Egress([" 10.1.0.0/16", "fd00::/8 ", "127.0.0.1", "Mail.Internal", ""])
    assert egress.allows("a.test", "10.1.2.3")
    assert egress.allows("a.test", "::ffff:10.1.2.3")
    assert egress.allows("a.test", "fd12::1")
    assert egress.allows("a.test", "127.0.0.1")
    assert egress.allows("mail.internal.", "192.168.0.1")
    assert not egress.allows("a.test", "10.2.0.1")
    assert not egress.allows("a.test", "127.0.0.2")
    assert not egress.allows("other.internal", "192.168.0.1")


@pytest.mark.parametrize("entry", ["10.0.0.0/33", "fd00::/129", "a b", "host:25"])
def test_an_invalid_allowed_entry_prevents_the_start(entry: str) -> None:
    with pytest.raises(ConfigurationError, match="OUTBOX_SMTP_ALLOW"):
        Egress([entry])


def test_a_failure_of_tls_is_told_without_openssls_notation() -> None:
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = context.wrap_bio(incoming, outgoing, server_hostname="mail.example")
    incoming.write(b"220 mail.example ESMTP\r\n")
    with pytest.raises(ssl.SSLError) as caught:
        session.do_handshake()
    assert "_ssl.c" in str(caught.value)
    said = reason_of(caught.value)
    assert said.startswith("TLS failed: ")
    assert "_ssl" not in said
    assert "[" not in said
