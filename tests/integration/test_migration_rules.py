"""Every migration after the last release only expands, or is marked as a contract step."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from bench.migration import FIRST
from outbox_server.shared.database.migrating import migrate
from release.revisions import all_revisions, released_revisions
from tests.migration_rules import CONTRACT, broken_rules, recorded_locks, recorded_statements
from tests.release_after import VERSIONS, contract_step

LAST_RELEASED = list(released_revisions().values())[-1]
FOLDER = Path(__file__).parents[2] / "shared" / "database" / "migrations" / "versions"
NEXT = ["9001", "9002", "9003", "9004", "9005"]


def oldest_revision(revision: str, *folders: Path) -> str | None:
    """Return the mark of a contract step; None for an expand step."""
    (path,) = [path for folder in folders for path in folder.glob(f"{revision}_*.py")]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: str | None = getattr(module, "oldest_revision", None)
    return found


def test_every_migration_after_the_last_release_keeps_that_release_running(
    new_database: Callable[[], str], tmp_path: Path
) -> None:
    url = new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    migrate(url, revision=LAST_RELEASED)
    versions = contract_step(tmp_path, oldest=LAST_RELEASED)
    with recorded_statements() as (statements, say):
        migrate(url, say=say, more_versions=versions)
    expected = [one for one in all_revisions() if one > LAST_RELEASED] + NEXT
    assert list(statements) == expected
    for revision, recorded in statements.items():
        oldest = oldest_revision(revision, FOLDER, versions)
        broken = broken_rules(recorded)
        if oldest is None:
            assert broken == set(), f"{revision} is no expand step; see CONTRIBUTING.md"
        else:
            assert broken <= CONTRACT, f"{revision}: a contract step may not do this"
            assert oldest <= LAST_RELEASED, (
                f"{revision}: the last release, with revision {LAST_RELEASED}, cannot run after it"
            )
    # The contract step of the next release is recognized as one.
    assert broken_rules(statements["9005"]) == {"ban-drop-column"}
    assert oldest_revision("9004", VERSIONS) is None


def test_a_migration_that_changes_several_tables_locks_all_of_them_first(
    new_database: Callable[[], str],
) -> None:
    """Otherwise it may wait for a writer that waits for it, in every try."""
    url = new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    migrate(url, revision=FIRST)
    with recorded_locks() as (locks, say):
        migrate(url, say=say, more_versions=VERSIONS)
    several = {
        revision: (locked, first) for revision, (locked, first) in locks.items() if len(locked) > 1
    }
    assert several["9001"] == ({"attempts", "email_jobs"}, {"attempts", "email_jobs"})
    for revision, (locked, first) in several.items():
        assert locked == first, f"{revision} lacks lock_tables{tuple(sorted(locked))}"


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE email_jobs DROP COLUMN failures",
        "ALTER TABLE email_jobs RENAME COLUMN failures TO trials",
        "ALTER TABLE email_jobs RENAME TO mails",
        "ALTER TABLE email_jobs ALTER COLUMN row_number TYPE bigint",
        "ALTER TABLE email_jobs ALTER COLUMN variables SET NOT NULL",
        "ALTER TABLE email_jobs ADD COLUMN rank integer NOT NULL",
        "ALTER TABLE email_jobs ADD COLUMN rank double precision DEFAULT random()",
        "CREATE INDEX ix_rank ON email_jobs (attempt)",
        "DROP INDEX ix_email_jobs_head",
        "DROP TABLE email_jobs",
        "ALTER TABLE email_jobs ADD CONSTRAINT ck_positive CHECK (attempt >= 0)",
        "ALTER TABLE email_jobs ADD CONSTRAINT uq_rank UNIQUE (attempt)",
        "ALTER TABLE email_jobs ADD CONSTRAINT fk FOREIGN KEY (batch_id) REFERENCES batches (id)",
        "UPDATE email_jobs SET attempt = 0",
        "delete from attempts",
    ],
)
def test_a_step_that_blocks_or_breaks_the_last_release_is_recognized(statement: str) -> None:
    assert broken_rules(["BEGIN", statement, "COMMIT"])


@pytest.mark.parametrize(
    "statements",
    [
        ["BEGIN", "ALTER TABLE email_jobs ADD COLUMN rank integer", "COMMIT"],
        ["BEGIN", "ALTER TABLE email_jobs ADD COLUMN rank integer DEFAULT 1 NOT NULL", "COMMIT"],
        ["CREATE INDEX CONCURRENTLY ix_rank ON email_jobs (attempt)"],
        [
            "BEGIN",
            "ALTER TABLE email_jobs ADD CONSTRAINT ck_positive CHECK (attempt >= 0) NOT VALID",
            "COMMIT",
        ],
        ["BEGIN", "ALTER TABLE email_jobs VALIDATE CONSTRAINT ck_positive", "COMMIT"],
        [
            "BEGIN",
            "CREATE TABLE things (id bigint PRIMARY KEY, name text NOT NULL)",
            "CREATE INDEX ix_things_name ON things (name)",
            "COMMIT",
        ],
    ],
)
def test_an_expand_step_is_permitted(statements: list[str]) -> None:
    assert broken_rules(statements) == set()
