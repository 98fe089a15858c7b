"""How messages show a text of a caller: cut to a length, with `...` behind a cut text.

`services/scheduler/erasing.py` finds addresses in such texts.
"""

from __future__ import annotations

# The usual limit, in characters.
_MOST = 80


def shortened(text: str, most: int = _MOST) -> str:
    """Return the first characters of a text."""
    return text if len(text) <= most else f"{text[:most]}..."


def quoted(text: str, most: int = _MOST) -> str:
    """Return the first characters of a text, in quotes and escaped."""
    return repr(shortened(text, most))
