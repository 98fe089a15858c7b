"""The migrations of the next release in `next_release/`, and a contract step after it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

VERSIONS: Final = Path(__file__).parent / "next_release"
LAST: Final = "9004"
INDEX: Final = "ix_email_jobs_next_rank"

_CONTRACT: Final = """
from alembic import op

revision = "9005"
down_revision = "9004"
oldest_revision = "{oldest}"


def upgrade():
    op.drop_column("email_jobs", "next_note")
"""


def contract_step(folder: Path, oldest: str) -> Path:
    """Copy the migrations to `folder`, and add one that only code from `oldest` on can use."""
    for path in VERSIONS.glob("*.py"):
        (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "9005_contract.py").write_text(_CONTRACT.format(oldest=oldest), encoding="utf-8")
    return folder
