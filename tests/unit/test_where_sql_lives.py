"""Statements are built and executed only in the modules of `storage/`."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
# Any module may pass an engine or a connection to a function of a storage module.
HANDLES: Final = {"AsyncConnection", "AsyncEngine"}
# They need the driver, but have no statement for data of the installation.
EXCEPTIONS: Final = {
    "cli/audit.py": "turns the driver's errors into a message for the command line",
    "cli/database.py": "turns the driver's errors into a message for the command line",
    "cli/migrate.py": "the same, and it shows the URL of the database without its password",
    "deploy/drill/database.py": "the storage module of the drill",
    "services/scheduler/webhook_posts.py": "its `stream` is that of an HTTP client",
    "deploy/embedded/postgres.py": "creates the role and the database of the embedded server",
}
MODELS: Final = "outbox_server.shared.database.models"
EXECUTING: Final = {"execute", "executemany", "scalar", "scalars", "stream", "stream_scalars"}
# Every violation contains one of these texts, so a module without them need not be parsed.
MENTION: Final = re.compile(
    rf"sqlalchemy|psycopg|{re.escape(MODELS)}|\.\s*({'|'.join(sorted(EXECUTING))})\b"
)


def modules() -> list[str]:
    """The modules outside `storage/`, by their paths."""
    found = [
        path.relative_to(ROOT)
        for package in ("services", "cli", "deploy")
        for path in (ROOT / package).rglob("*.py")
    ]
    assert len(found) > 100
    return sorted(str(path) for path in found if "storage" not in path.parts)


def violations(source: str) -> list[str]:
    """Return the names in a module that only a storage module may use."""
    if not MENTION.search(source):
        return []
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            taken = {name.name for name in node.names}
            if node.module != "sqlalchemy.ext.asyncio" or taken - HANDLES:
                names = [node.module or ""]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            names = [f".{node.func.attr}"] if node.func.attr in EXECUTING else []
        found += [
            name
            for name in names
            if name.startswith(".")
            or name.partition(".")[0] in ("sqlalchemy", "psycopg")
            or f"{name}.".startswith(f"{MODELS}.")
        ]
    return found


def test_only_storage_modules_contain_sql() -> None:
    found = {module: violations((ROOT / module).read_text()) for module in modules()}
    assert {
        module: names for module, names in found.items() if names and module not in EXCEPTIONS
    } == {}
    assert all(found[module] for module in EXCEPTIONS), "one of them needs no exception any more"


@pytest.mark.parametrize(
    "line",
    [
        "from sqlalchemy import select",
        "from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine",
        "import sqlalchemy.exc",
        "import psycopg",
        "from outbox_server.shared.database.models import Sender",
        "from outbox_server.shared.database.models.senders import Sender",
        "async def read(connection):\n    await connection.scalar('SELECT 1')",
    ],
)
def test_sql_is_recognized(line: str) -> None:
    assert violations(line)


def test_importing_engine_types_is_allowed() -> None:
    assert not violations("from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine")
