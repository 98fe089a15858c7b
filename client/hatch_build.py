"""Generates code that is never committed: the protobuf and gRPC code, and the blocking client.

Runs as hatch's build hook, and as a script for `make protos`.

- `src/outbox/v1`: protoc's modules, their type stubs, and `outbox.binpb`, the descriptors with
  their comments, for tools that want them in a file, and `service_config.json`.
- `src/outbox_client/_sync`: `_async` without its `async` and `await`, so that there is one client
  to keep and not two.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT: Final = Path(__file__).parent
SOURCE: Final = ROOT / "src"
STUBS: Final = SOURCE / "outbox"
ASYNC: Final = SOURCE / "outbox_client" / "_async"
SYNC: Final = SOURCE / "outbox_client" / "_sync"

# unasync drops `async` and `await` and renames the standard names, such as `__aenter__`. These are
# ours: a name, or a string that holds nothing but a name.
_SERVICES: Final = (
    "ApiKey",
    "Audit",
    "Batch",
    "Dispatcher",
    "EmailJob",
    "EmailJobEvent",
    "Hold",
    "Sender",
    "Server",
    "Stats",
    "Suppression",
    "User",
    "Webhook",
)
_BLOCKING_NAMES: Final = {
    "_async": "_sync",
    "aio": "blocking",
    "grpc.aio.Channel": "grpc.Channel",
    "aclosing": "closing",
    "AsyncClient": "Client",
    "AsyncServices": "Services",
    "Rows": "BlockingRows",
} | {f"{name}ServiceAsyncStub": f"{name}ServiceStub" for name in _SERVICES}


def generate() -> None:
    """Replace all generated code.

    Raises:
        RuntimeError: protoc refused the protos; it has printed why.
    """
    shutil.rmtree(STUBS, ignore_errors=True)
    shutil.rmtree(SYNC, ignore_errors=True)
    _write_blocking_client()
    _write_stubs(_protos())


def _protos() -> Path:
    """Return the folder of the protos: beside us in an sdist, one above in the repository."""
    beside = ROOT / "protos"
    return beside if beside.is_dir() else ROOT.parent / "protos"


def _write_stubs(protos: Path) -> None:
    # Not protos/google: googleapis-common-protos has its modules, and a second copy of a file
    # cannot be imported beside the first.
    sources = sorted(str(path.relative_to(protos)) for path in protos.glob("outbox/**/*.proto"))
    package = STUBS / "v1"
    package.mkdir(parents=True)
    _protoc(
        protos,
        [
            f"--python_out={SOURCE}",
            f"--grpc_python_out={SOURCE}",
            f"--mypy_out=quiet:{SOURCE}",
            f"--mypy_grpc_out=quiet:{SOURCE}",
            *sources,
        ],
    )
    # A JSON transcoder needs google.rpc's error details in the set, or its errors are empty.
    details = ["google/rpc/error_details.proto", "google/rpc/status.proto"]
    _protoc(
        protos,
        [
            "--include_imports",
            # Comments, which `buf lint` checks and API pages are made from.
            "--include_source_info",
            f"--descriptor_set_out={package / 'outbox.binpb'}",
            *sources,
            *details,
        ],
    )
    # The deadlines and retries of the methods, for gRPC clients and for our own.
    name = "service_config.json"
    shutil.copyfile(protos / "outbox" / "v1" / name, package / name)
    for folder in (STUBS, package):
        (folder / "__init__.py").touch()
        (folder / "py.typed").touch()


def _protoc(protos: Path, arguments: Sequence[str]) -> None:
    import google.rpc
    import grpc_tools
    from grpc_tools import protoc

    # The plugins lie beside the interpreter, which may run without its environment activated; in
    # an isolated build they are on the PATH.
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    plugins = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    includes = (
        protos,
        Path(grpc_tools.__file__).parent / "_proto",
        Path(next(iter(google.rpc.__path__))).parent.parent,
    )
    outcome = protoc.main(
        [
            "protoc",
            *(f"-I{include}" for include in includes),
            *(f"--plugin={name}={shutil.which(name, path=beside)}" for name in plugins),
            *arguments,
        ]
    )
    if outcome:
        raise RuntimeError(f"protoc ended with {outcome}")


def _write_blocking_client() -> None:
    import unasync

    rule = unasync.Rule(f"{ASYNC}/", f"{SYNC}/", additional_replacements=_BLOCKING_NAMES)
    unasync.unasync_files([str(path) for path in ASYNC.glob("*.py")], [rule])
    for path in SYNC.glob("*.py"):
        note = f"# Generated from _async/{path.name} by hatch_build.py: change that.\n"
        path.write_text(note + path.read_text(encoding="utf-8"), encoding="utf-8")


class StubsBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """hatch's hook: every build, an editable one too, starts from fresh generated code."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate before hatch collects the files."""
        if self.target_name == "wheel":  # an sdist has the sources
            generate()


if __name__ == "__main__":
    try:
        generate()
    except RuntimeError as error:
        sys.exit(str(error))
