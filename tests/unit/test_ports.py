from __future__ import annotations

import socket
from itertools import combinations

import pytest

from outbox_server.deploy import ports
from outbox_server.deploy.ports import LOOPBACK, claim_port, free_port


def test_a_free_port_is_none_that_the_system_gives_to_others() -> None:
    found = [free_port() for _ in range(200)]
    assert len(set(found)) == 200
    with socket.socket() as other:
        other.bind((LOOPBACK, 0))
        assert max(found) < other.getsockname()[1]


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as first:
        first.bind((LOOPBACK, free_port()))
        taken = first.getsockname()[1]
        assert free_port(taken) != taken


def test_a_port_claimed_by_one_stack_is_not_given_to_another_until_it_stops() -> None:
    port = free_port()
    first = claim_port(port)
    assert first is not None
    assert claim_port(port) is None
    first.close()
    again = claim_port(port)
    assert again is not None
    again.close()


def test_a_port_claim_holds_for_stacks_with_another_temporary_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = free_port()
    first = claim_port(port)
    assert first is not None
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert claim_port(port) is None
    first.close()


def test_processes_with_parts_of_the_ports_try_different_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ports, "_ports", ports._unassigned_ports())
    found = []
    for part in range(3):
        ports.skip_to_part(part, 3, seed=10**20)
        found.append(free_port())
    assert all(abs(one - other) > 1_000 for one, other in combinations(found, 2))
