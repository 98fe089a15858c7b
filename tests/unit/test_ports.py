from __future__ import annotations

import pytest

from outbox_server.deploy.ports import claim_port, free_port


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
