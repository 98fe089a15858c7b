"""`outbox schedule` with files of other programs, as a dry run and for real."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.commands import CommandResult, outbox
from tests.scheduler_stack import Scheduler

EXPORT = (
    'Customers of "ACME\r\n\r\nTo;Size (");Kontakt;points\r\n'
    "2026;5;ann@b.org;120\r\n;;;\r\n2027;6;bob@b.org;\r\n\x1a"
)
OPTIONS = ("--skip-lines", "2", "--email-column", "kontakt", "--subject", "Hi {{ to }}")
GOLD = "{% if points > 100 %}gold{% endif %}"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> None:
    Path(name).write_bytes(text.encode())


def read(name: str) -> str:
    return Path(name).read_bytes().decode()


async def both(scheduler: Scheduler, text: str, *words: str) -> tuple[CommandResult, CommandResult]:
    """Schedule a file as a dry run, then for real."""
    write("people.csv", text)
    sender = (await scheduler.sender()).sender_id
    words = ("schedule", "people.csv", "--sender", sender, *words)
    dry = await outbox(scheduler, *words, "--dry-run")
    return dry, await outbox(scheduler, *words)


async def test_an_export_with_a_title_and_another_address_column_is_scheduled(
    scheduler: Scheduler,
) -> None:
    dry, real = await both(scheduler, EXPORT, *OPTIONS, "--body", GOLD, "--rejections", "bad.csv")
    # The dry run has made the file of rejections, so the real one refuses to replace it.
    assert (dry.exit_code, real.exit_code) == (0, 1)
    assert "Kontakt" in dry.stdout
    assert "2 rows read: 1 would be accepted, 1 rejected" in dry.stderr
    header, row = read("bad.csv").splitlines()
    assert header.startswith("To;")
    assert "TEMPLATE_RENDER_FAILED;in --body: line 1, column 14: `points` is empty" in row

    (await asyncio.to_thread(Path.unlink, Path("bad.csv")))
    sender = (await scheduler.sender()).sender_id
    words = ("--sender", sender, *OPTIONS, "--body", GOLD, "--rejections", "bad.csv")
    real = await outbox(scheduler, "schedule", "people.csv", *words)
    assert real.exit_code == 0
    assert "2 rows read: 1 accepted, 1 rejected" in real.stderr
    assert "email_column" in real.stdout
    assert "Kontakt" in real.stdout
    # Options of the first file are not needed for the file of its rejections.
    fixed = read("bad.csv").replace("bob@b.org;", "bob@b.org;7")
    write("fixed.csv", fixed)
    again = await outbox(
        scheduler,
        *("schedule", "fixed.csv", "--sender", sender, "--email-column", "Kontakt"),
        *("--subject", "Hi {{ to }}", "--body", GOLD, "-o", "json"),
    )
    batch = json.loads(again.stdout)["batch"]
    assert (batch["accepted_count"], batch["email_column"]) == ("1", "Kontakt")


_MISTAKES = [
    ("a;b\nx;y\n", (), "or --email-column must name its column of addresses"),
    ("a;b\nx;y\n", ("--email-column", "c"), "no column 'c', which --email-column names"),
    ("a\n", ("--skip-lines", "5"), "after the 5 lines that --skip-lines skips"),
    ("email\na@b.org\n", ("--skip-lines", "2000"), "--skip-lines: must be 0 to 1,000"),
    ("email\na@b.org\n", ("--email-column", "x" * 300), "--email-column: must have at most"),
    ("email\na@b.org\n", ("--body", "{% if %}"), "--body: line 1, column 4: the tag `if`"),
    ("email\na@b.org\n", ("--subject", "a\nb"), "--subject: a subject cannot contain"),
    (
        "email\na@b.org\n",
        ("--spread-until", "in 1h", "--spacing", "1s"),
        "--spread-until: cannot be combined with --spacing",
    ),
    (
        "email,points\na@b.org,\n",
        ("--mode", "strict", "--body", GOLD),
        "row 1: in --body: line 1, column 14: `points` is empty",
    ),
    ("email\na@b.org\n", ("--time-zone", "Mars"), "--time-zone: 'Mars' is not a time zone"),
]


async def test_errors_use_the_words_of_the_command_line(scheduler: Scheduler) -> None:
    for text, words, said in _MISTAKES:
        for result in await both(scheduler, text, "--body", "b", "--subject", "s", *words):
            assert result.exit_code == 1
            assert said in " ".join(result.stderr.split())
            assert "options." not in result.stderr
    write("people.csv", "a;b\nx;y\n")
    for words in ((), ("--email-column", "c")):
        result = await outbox(
            scheduler, "suppressions", "import", "people.csv", "--user", "ann", *words
        )
        assert result.exit_code == 1
        text = " ".join(result.stderr.split())
        assert "--email-column" in text
        assert "email_column" not in text


async def test_a_sender_that_does_not_exist_is_named_by_its_flag(scheduler: Scheduler) -> None:
    write("people.csv", "email\na@b.org\n")
    words = ("people.csv", "--sender", "99", "--subject", "s", "--body", "b")
    result = await outbox(scheduler, "schedule", *words)
    assert result.exit_code == 1
    assert "sender_id" not in result.stderr
