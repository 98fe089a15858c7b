"""The limits that delay the mail of a sender: the list that every implementation must cover.

A limit is implemented in four places: the Lua scripts apply it (`limits.lua`), the forecast
predicts it (`simulation.py`), the audit checks it afterwards (`audit/replay.py`), and the tests
have a model of the scripts (`queue_model.py`). A fifth place, `explaining.py`, reports it to
callers as a WaitReason.

Each place marks the code of a limit with its name, such as `Limit.GAP`, or says why it does not
implement it: `Without Limit.CIRCUIT: ...`. `tests/unit/test_sender_limits.py` fails if a place does
neither. So to add a limit, add it here and follow the failures.
"""

from __future__ import annotations

from enum import Enum, auto


class Limit(Enum):
    """A limit that delays the mail of a sender."""

    # `min_gap`: from the end of a send to the start of the next.
    GAP = auto()
    # `hourly_limit`: sends whose ends lie in one trailing window.
    WINDOW = auto()
    # `max_in_flight`: sends at once.
    IN_FLIGHT = auto()
    # `limits.hourly_limit` of the user: sends of all its senders in one trailing window.
    USER_WINDOW = auto()
    # `limits.min_gap` of the user: from the end of a send of any of its senders to the next start.
    USER_GAP = auto()
    # PauseSender.
    PAUSE = auto()
    # `sending_hours`: the openings of a week.
    SENDING_HOURS = auto()
    # The mail server refuses the account; one probe at a time.
    COOLDOWN = auto()
    # Connections fail in a row; one probe at a time.
    CIRCUIT = auto()
    # The mail server replies that mail comes too fast: a longer gap, for a while.
    PACE = auto()
