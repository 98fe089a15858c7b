"""Scripts and hints read grpcurl's JSON in both of its spellings."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from outbox_server.cli.up_output import examples

ROOT = Path(__file__).parents[2]
# The output of grpcurl with reflection, as far as the script reads it.
ANSWERS = """#!/bin/sh
case "$*" in
  *CreateSender) echo '{"sender_id": "7", "hourly_limit": 200}' ;;
  *ScheduleBatch) echo '{"batch": {"batch_id": "8", "accepted_count": "2"}}' ;;
  *\\"8\\"*GetBatch) echo '{"state": "BATCH_STATE_DONE", "counts": {"sent_count": "2"}}' ;;
esac | tr ',{' '\\n\\n'
"""
SPELLINGS = {
    "by reflection": ANSWERS,
    "with a protoset": (
        ANSWERS.replace("sender_id", "senderId")
        .replace("batch_id", "batchId")
        .replace("accepted_count", "acceptedCount")
        .replace("sent_count", "sentCount")
    ),
}


@pytest.fixture(params=SPELLINGS)
def grpcurl(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    program = tmp_path / "grpcurl"
    program.write_text(SPELLINGS[request.param])
    program.chmod(0o755)
    return program


def run(command: str | Path, grpcurl: Path) -> list[str]:
    environment = {"PATH": f"{grpcurl.parent}:/usr/bin:/bin", "GRPCURL": str(grpcurl)}
    words = ["/bin/bash", "-euo", "pipefail", "-c", str(command)]
    done = subprocess.run(words, env=environment, capture_output=True, check=True, text=True)
    return done.stdout.splitlines()


def test_the_shell_example_reads_both_json_spellings(grpcurl: Path) -> None:
    script = ROOT / "examples" / "grpcurl" / "schedule.sh"
    assert run(script, grpcurl) == ["accepted 2", "sent 2"]


def test_the_hint_of_up_reads_both_json_spellings(grpcurl: Path) -> None:
    found = {"scheduler": "127.0.0.1:1", "stats": "127.0.0.1:2", "api_key_file": None}
    (hint,) = (line for line in examples(found, None) if line.startswith("sender="))
    _, _, pipe = hint.partition("grpcurl ")
    assert run(f"sender=$({grpcurl} {pipe}; echo $sender", grpcurl) == ["7"]
