"""Each place that knows limits implements every limit, or leaves it out for a stated reason."""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import pytest
from outbox.v1 import email_job_service_pb2

from outbox_server.services.scheduler import explaining
from outbox_server.shared.audit import replay
from outbox_server.shared.forecast import simulation
from outbox_server.shared.sender_limits import Limit
from tests.integration import queue_model

_MARKER = re.compile(r"(Without )?Limit\.([A-Z_]+)(: \w)?")
_WAIT_REASON = re.compile(r"^    ([A-Z_]+) = \d+(?P<limits>.*Limit\..*)?$", re.MULTILINE)
# Reasons for the wait of a single job; they are not limits of its sender.
_OF_THE_JOB = {
    *("UNSPECIFIED", "NOT_DUE", "RETRY", "DEFERRED", "DISPATCHER", "SHARE", "HELD"),
    "BATCH_PAUSED",
}

SCRIPT = files("outbox_server.shared.queue") / "lua" / "includes" / "limits.lua"
# The first file of each place names the other places.
PLACES: dict[str, list[Traversable]] = {
    "limits.lua": [SCRIPT],
    "simulation.py": [
        Path(simulation.__file__),
        Path(simulation.__file__).with_name("forecasts.py"),
    ],
    "replay.py": [Path(replay.__file__)],
    "queue_model.py": [
        Path(queue_model.__file__),
        Path(queue_model.__file__).with_name("queue_state.py"),
    ],
    "explaining.py": [Path(explaining.__file__)],
}


@pytest.mark.parametrize("place", PLACES)
def test_each_place_implements_every_limit_or_states_a_reason(place: str) -> None:
    text = "".join(file.read_text(encoding="utf-8") for file in PLACES[place])
    implemented: set[str] = set()
    left_out: set[str] = set()
    for without, name, reason in _MARKER.findall(text):
        assert not without or reason, f"{place} leaves out {name} without a reason"
        (left_out if without else implemented).add(name)

    assert implemented | left_out == {limit.name for limit in Limit}
    assert not implemented & left_out


@pytest.mark.parametrize("place", PLACES)
def test_each_place_refers_to_the_other_places_and_the_list(place: str) -> None:
    text = PLACES[place][0].read_text(encoding="utf-8")
    for other in (*PLACES, "sender_limits.py"):
        assert other == place or other in text, f"{place} does not name {other}"


def test_every_wait_reason_belongs_to_a_limit_or_to_the_job() -> None:
    text = PLACES["explaining.py"][0].read_text(encoding="utf-8")
    of_limits = {match[1] for match in _WAIT_REASON.finditer(text) if match["limits"]}

    values = email_job_service_pb2.WaitReason.DESCRIPTOR.values
    names = {value.name.removeprefix("WAIT_REASON_") for value in values}
    assert names == of_limits | _OF_THE_JOB
    assert not of_limits & _OF_THE_JOB
    assert names == {reason.name for reason in explaining.WaitReason}
