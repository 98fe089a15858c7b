"""Generates the protobuf and gRPC code, with type stubs, into ``shared/pb``.

Runs as hatch's build hook, and as a script for ``make protos``. What it writes is never committed.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
TARGET = ROOT / "shared" / "pb"
ROOTS = (ROOT / "protos", ROOT / "third_party")


def generate() -> None:
    """Replace ``shared/pb`` with code generated from every .proto of the project.

    Raises:
        RuntimeError: protoc refused the protos; it has printed why.
    """
    import google.rpc
    import grpc_tools
    from grpc_tools import protoc

    # The plugins lie beside the interpreter, which may run without its environment activated.
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    sources = sorted(
        str(path.relative_to(root)) for root in ROOTS for path in root.rglob("*.proto")
    )
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir(parents=True)
    includes = [
        *ROOTS,
        Path(grpc_tools.__file__).parent / "_proto",
        Path(next(iter(google.rpc.__path__))).parent.parent,
    ]
    outcome = protoc.main(
        [
            "protoc",
            *(f"-I{include}" for include in includes),
            f"--python_out={TARGET}",
            f"--grpc_python_out={TARGET}",
            *(
                f"--plugin={name}={shutil.which(name, path=beside)}"
                for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
            ),
            f"--mypy_out=quiet:{TARGET}",
            f"--mypy_grpc_out=quiet:{TARGET}",
            "--include_imports",
            # Comments, which `buf lint` checks and API pages are made from.
            "--include_source_info",
            f"--descriptor_set_out={TARGET / 'outbox.binpb'}",
            *sources,
            "google/rpc/error_details.proto",
            "google/rpc/status.proto",
        ]
    )
    if outcome:
        raise RuntimeError(f"protoc ended with {outcome}")
    # google.rpc is named for the descriptor set alone (a JSON transcoder needs it); its modules
    # come from googleapis-common-protos, and a second copy would shadow them.
    shutil.rmtree(TARGET / "google", ignore_errors=True)
    # A regular package `grpc` here would shadow grpcio's: only our own package gets an __init__.
    for folder in (TARGET / "outbox", TARGET / "outbox" / "v1"):
        if folder.is_dir():
            (folder / "__init__.py").touch()


class ProtoBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """hatch's hook: every build, an editable one too, starts from fresh generated code."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate before hatch collects the files."""
        generate()


if __name__ == "__main__":
    try:
        generate()
    except RuntimeError as error:
        sys.exit(str(error))
