"""Which calls and connections count as those of one peer."""

import pytest

from outbox_server.shared.errors import ResourceExhausted
from outbox_server.shared.rpc.peers import PeerPlaces, peer_of, peer_of_call


@pytest.mark.parametrize(
    ("described", "peer"),
    [
        ("ipv4:192.0.2.1:5000", "192.0.2.1"),
        ("ipv6:%5B2001:db8:1:2:3::4%5D:5000", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::9]:5000", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:192.0.2.1%5D:5000", "192.0.2.1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", "fe80::/64"),
        ("unix:/run/outbox.sock", "unix"),
    ],
)
def test_a_peer_is_an_address_or_a_network_of_ipv6(described: str, peer: str) -> None:
    assert peer_of_call(described) == peer


def test_two_hosts_of_one_ipv6_network_are_one_peer() -> None:
    assert peer_of("2001:db8::1") == peer_of("2001:db8::ffff:1")
    assert peer_of("2001:db8::1") != peer_of("2001:db8:0:1::1")


def test_a_refusal_says_whose_limit_it_was_and_an_ended_call_frees_its_place() -> None:
    places = PeerPlaces("calls", per_peer=1, total=2)
    with places.place_of("a"):
        with (
            pytest.raises(ResourceExhausted, match="1 calls of peer a are in"),
            places.place_of("a"),
        ):
            pass
        with (
            places.place_of("b"),
            pytest.raises(ResourceExhausted, match="2 calls of all peers together"),
            places.place_of("c"),
        ):
            pass
    with places.place_of("a"), places.place_of("c"):
        pass
