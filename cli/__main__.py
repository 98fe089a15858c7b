"""The entry point of the `outbox` command and of `python -m cli`."""

from __future__ import annotations

import os
import signal
import sys

# Libraries that only the command line needs: an image that runs services has none of them.
_CLI_LIBRARIES = ("rich", "typer")


def main() -> None:
    """Run the command line. If it is not installed, say how to install it."""
    if os.getpid() == 1:
        # In a container: for process 1 the kernel has no default action, and ignores a SIGTERM
        # that nothing handles. Services handle it once they run; `outbox migrate` never does.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
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
