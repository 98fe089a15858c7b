"""The capabilities that a server reports are those that the contract explains."""

from __future__ import annotations

import re
from pathlib import Path

from outbox_server.shared.rpc.server_info import CAPABILITIES

PROTO = Path(__file__).parents[2] / "protos" / "outbox" / "v1" / "server_service.proto"


def test_every_capability_is_explained_in_the_contract() -> None:
    explained = re.findall(r"(?m)^  // - `([\w.]+)`: ", PROTO.read_text(encoding="utf-8"))
    assert tuple(explained) == CAPABILITIES
    assert sorted(CAPABILITIES) == explained
