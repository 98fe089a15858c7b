"""The entry point of the `outbox` command and of `python -m cli`."""

from __future__ import annotations

import sys

# Libraries that only the command line needs: an image that runs services has none of them.
_CLI_LIBRARIES = ("rich", "typer")


def main() -> None:
    """Run the command line. If it is not installed, say how to install it."""
    try:
        from outbox_server.cli.main import main as run
    except ModuleNotFoundError as error:
        if error.name not in _CLI_LIBRARIES:
            raise
        sys.exit(
            "outbox: the command line is not installed: pip install 'outbox[cli]'; "
            "without it, start a service with python -m outbox_server.services.NAME"
        )
    run()


if __name__ == "__main__":
    main()
