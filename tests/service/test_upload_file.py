"""UploadBatchFile: the body of an HTTP request, as a JSON transcoder forwards it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from google.api.httpbody_pb2 import HttpBody
from outbox.v1 import batch_pb2
from outbox.v1.batch_service_pb2 import ScheduleBatchResponse, UploadBatchFileRequest

from tests.scheduler_stack import Scheduler, options_for, refusal_of

CSV = "email,name\nann@b.org,Änne\nbob@b.org,Bob\n".encode()


async def upload(
    scheduler: Scheduler, options: batch_pb2.BatchOptions, pieces: list[bytes], kind: str = ""
) -> ScheduleBatchResponse:
    async def messages() -> AsyncIterator[UploadBatchFileRequest]:
        first = HttpBody(content_type=kind, data=pieces[0])
        yield UploadBatchFileRequest(options=options, file=first)
        for piece in pieces[1:]:
            yield UploadBatchFileRequest(file=HttpBody(data=piece))

    return await scheduler.batches.UploadBatchFile(messages())


async def test_a_file_in_pieces_is_accepted_once_per_request_id(scheduler: Scheduler) -> None:
    options = options_for(await scheduler.sender(), subject="Hello {{ name }}")
    # The second byte of a character is in the next piece.
    cut = CSV.index("Ä".encode()) + 1
    answer = await upload(scheduler, options, [CSV[:cut], CSV[cut:]], "text/csv; charset=utf-8")
    assert (answer.batch.accepted_count, answer.replayed) == (2, False)
    assert scheduler.value("SELECT count(*) FROM email_jobs") == 2
    again = await upload(scheduler, options, [CSV], "application/x-www-form-urlencoded")
    assert (again.batch.batch_id, again.replayed) == (answer.batch.batch_id, True)
    refusal = await refusal_of(upload(scheduler, options, [CSV + b"cy@b.org,Cy\n"]))
    assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")


async def test_the_options_of_a_file_work_and_a_repeated_call_names_its_address_column(
    scheduler: Scheduler,
) -> None:
    sender = await scheduler.sender()
    csv = b"Export of 1 December\nTo;Konto;email\n2026;ann@b.org;old@b.org\n;;\n\x1a"
    options = options_for(sender, subject="{{ to }}", email_column="konto", skip_lines=1)
    for replayed in (False, True):
        answer = await upload(scheduler, options, [csv])
        assert answer.replayed is replayed
        assert (answer.batch.email_column, answer.batch.accepted_count) == ("Konto", 1)
    assert scheduler.value("SELECT recipient FROM email_jobs") == "ann@b.org"
    # Another column makes it another request.
    options.email_column = "email"
    assert (await refusal_of(upload(scheduler, options, [csv]))).reason == "REQUEST_ID_REUSED"


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/json"])
async def test_a_body_that_is_not_csv_is_refused_by_its_content_type(
    scheduler: Scheduler, kind: str
) -> None:
    options = options_for(await scheduler.sender())
    refusal = await refusal_of(upload(scheduler, options, [b"--x\r\n"], kind))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "FILE_TYPE_INVALID")
    assert "--data-binary" in refusal.violations["file"]
    assert scheduler.value("SELECT count(*) FROM batches") == 0


async def test_an_error_of_the_file_names_the_field_file(scheduler: Scheduler) -> None:
    options = options_for(await scheduler.sender())
    refusal = await refusal_of(upload(scheduler, options, [b""]))
    assert (refusal.reason, list(refusal.violations)) == ("CSV_EMPTY", ["file"])


async def test_an_upload_without_a_message_is_refused(scheduler: Scheduler) -> None:
    async def nothing() -> AsyncIterator[UploadBatchFileRequest]:
        requests: list[UploadBatchFileRequest] = []
        for request in requests:
            yield request

    refusal = await refusal_of(scheduler.batches.UploadBatchFile(nothing()))
    assert refusal.reason == "UPLOAD_OUT_OF_ORDER"
