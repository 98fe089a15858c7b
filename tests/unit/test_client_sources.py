from __future__ import annotations

import io
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from outbox_client.sources import CHUNK_BYTES, Chunks, source_of


def chunks_of(*items: Any) -> tuple[bytes, int]:
    chunks = Chunks()
    parts = [chunk for item in items for chunk in chunks.take(item)]
    parts += chunks.rest()
    assert all(len(part) <= CHUNK_BYTES for part in parts)
    return b"".join(parts), chunks.rows


def test_small_pieces_are_joined_and_large_ones_are_split() -> None:
    data, _ = chunks_of(*[b"x"] * 100, b"y" * (3 * CHUNK_BYTES + 1))
    assert data == b"x" * 100 + b"y" * (3 * CHUNK_BYTES + 1)
    chunks = Chunks()
    assert list(chunks.take(b"email\n")) == []
    assert len(list(chunks.take(b"y" * CHUNK_BYTES))) == 2


@pytest.mark.parametrize(
    ("pieces", "rows"),
    [
        ([b""], 0),
        ([b"email\n"], 0),
        ([b"email\na@b.org\nc@d.org\n"], 2),
        ([b"email\na@b.org\nc@d.org"], 2),
        ([b"email\r\na@b.org\r\n"], 1),
        ([b"email\ra@b.org\rc@d.org\r"], 2),
        ([b'email,x\na@b.org,"1\n2', b'\n""3"\n'], 1),
    ],
)
def test_csv_rows_are_counted_by_line_ends_outside_of_quotes(
    pieces: list[bytes], rows: int
) -> None:
    assert chunks_of(*pieces)[1] == rows


def test_rows_are_quoted_where_needed_and_times_are_rfc_3339() -> None:
    time = datetime(2026, 12, 24, 18, tzinfo=UTC)
    data, rows = chunks_of(
        {"email": "a@b.org", "schedule_time": time, "n": 3}, {"email": 'x"y', "n": None}
    )
    assert data == (b'email,schedule_time,n\r\na@b.org,2026-12-24T18:00:00+00:00,3\r\n"x""y",,\r\n')
    assert rows == 2


def test_only_paths_files_and_lists_can_be_read_again(
    tmp_path: Path,
) -> None:
    path = tmp_path / "people.csv"
    path.write_bytes(b"email\n")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert (source_of(path).repeatable, source_of(str(path)).size) == (True, 6)
    assert (source_of(pipe).repeatable, source_of(pipe).size) == (False, None)
    assert source_of([{"email": "a@b.org"}]).repeatable
    assert not source_of(iter([b"email\n"])).repeatable
    file = io.BytesIO(b"skipped email\n")
    file.seek(8)
    source = source_of(file)
    assert (source.repeatable, source.size) == (True, 6)
    for _ in range(2):
        with source.open() as opened:
            assert opened.read() == b"email\n"


@pytest.mark.parametrize("wrong", [7, None, {"email": "a@b.org"}, io.StringIO("email\n")])
def test_an_unsupported_source_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError):
        source_of(wrong)


class Pandas:
    def to_csv(self, target: Any, *, index: bool) -> None:
        assert not index
        target.write("email\r\nä@b.org\r\n")


class Polars:
    def write_csv(self, target: Any) -> None:
        target.write("email\r\nä@b.org\r\n".encode())


@pytest.mark.parametrize("table", [Pandas(), Polars()])
def test_a_table_can_be_read_as_csv_twice(table: Any) -> None:
    source = source_of(table)
    for _ in range(2):
        with source.open() as opened:
            assert opened.read() == "email\r\nä@b.org\r\n".encode()


def test_reading_a_source_needs_only_the_memory_of_a_chunk() -> None:
    import tracemalloc  # noqa: PLC0415 - of this test alone

    def rows() -> Iterator[dict[str, str]]:
        for number in range(5_000):
            yield {"email": f"{number}@b.org", "text": "x" * 2_000}

    chunks, size = Chunks(), 0
    tracemalloc.start()
    for row in rows():
        size += sum(map(len, chunks.take(row)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 10_000_000
    assert peak < 1_000_000
