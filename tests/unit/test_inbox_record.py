from __future__ import annotations

from pathlib import Path

import pytest

from outbox_server.deploy.record import (
    ReceivedMail,
    RecordFile,
    least_gap_s,
    most_in_any_window,
    read_record,
)


def mail(
    started_at: float = 1.0, received_at: float = 2.0, mail_from: str = "a@x.test"
) -> ReceivedMail:
    return ReceivedMail(
        started_at=started_at,
        received_at=received_at,
        mail_from=mail_from,
        rcpt_tos=("to@y.test",),
        message_id="<1@x.test>",
        bytes=10,
        file="1",
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "record.jsonl"


def append(path: Path, *mails: ReceivedMail) -> None:
    record = RecordFile(path)
    for one in mails:
        record.append(one)
    record.close()


def test_a_record_returns_what_was_written(path: Path) -> None:
    mails = [mail(), mail(mail_from="\u00fc\udce4\n@x.test", started_at=1795534914.123456)]

    append(path, *mails)

    assert read_record(path) == mails


def test_a_missing_record_file_reads_as_empty(path: Path) -> None:
    assert read_record(path) == []


def test_appending_to_a_record_keeps_its_earlier_lines(path: Path) -> None:
    append(path, mail(1.0))
    append(path, mail(3.0))

    assert [one.started_at for one in read_record(path)] == [1.0, 3.0]


def test_a_truncated_line_is_skipped_and_affects_no_other(path: Path) -> None:
    append(path, mail(1.0))
    with path.open("ab") as file:
        file.write(b'{"started_at": 2')

    assert [one.started_at for one in read_record(path)] == [1.0]
    append(path, mail(3.0))
    assert [one.started_at for one in read_record(path)] == [1.0, 3.0]


def test_the_smallest_gap_is_measured_per_sender() -> None:
    mails = [
        mail(0.0, 1.0, "a@x.test"),
        mail(1.1, 1.2, "b@x.test"),
        mail(3.0, 4.0, "a@x.test"),
        mail(6.2, 6.3, "b@x.test"),
    ]

    assert least_gap_s(mails) == 2.0
    assert least_gap_s(mails[:2]) is None


def test_windows_are_counted_per_sender() -> None:
    mails = [mail(0, float(end), name) for end in (1, 2, 30) for name in ("a@x.test", "b@x.test")]

    assert most_in_any_window(mails[1:], 10) == {"a@x.test": 1, "b@x.test": 2}
