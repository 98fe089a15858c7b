"""The entry of the `outbox` command and of `python -m cli`."""

from __future__ import annotations

import sys

# Libraries of the command line alone: an image that runs services needs none of them.
_OF_THE_COMMAND_LINE = ("rich", "typer")


def main() -> None:
    """Run the command line. If it is not installed, say how to install it."""
    try:
        from outbox_server.cli.main import main as run
    except ModuleNotFoundError as error:
        if error.name not in _OF_THE_COMMAND_LINE:
            raise
        sys.exit(
            "outbox: the command line is not installed: pip install 'outbox[cli]'; "
            "without it, a service is run by python -m outbox_server.services.NAME"
        )
    run()


if __name__ == "__main__":
    main()
