"""Prints all texts of the command line in a form that cannot control the terminal.

Some of the texts that are printed come from servers and other users. A control character in such a
text could move the cursor, set the title of the window, or type in place of the user.
"""

from __future__ import annotations

import sys


def printable(text: str) -> str:
    r"""Return `text` with each character escaped that could control a terminal, such as `\x1b`.

    These are the control characters of ASCII and of Unicode (U+0080 to U+009F), and those without a
    width or that change the direction. Line breaks stay.
    """
    return "".join(
        char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text
    )


def say(text: str = "") -> None:
    """Print lines on stdout."""
    sys.stdout.write(f"{printable(text)}\n")
    sys.stdout.flush()


def write_exactly(content: bytes) -> None:
    """Write bytes to stdout as they are; on a terminal, as printable text."""
    if sys.stdout.isatty():
        say(content.decode("utf-8", "replace").replace("\r\n", "\n").removesuffix("\n"))
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


def note(text: str) -> None:
    """Print lines on stderr, apart from the result."""
    sys.stderr.write(f"{printable(text)}\n")
    sys.stderr.flush()
