"""Suppressions in numbers: imported from a CSV or rows, looked up, and exported."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody
from outbox.v1.email_job_pb2 import EMAIL_JOB_STATE_SUPPRESSED
from outbox.v1.email_job_service_pb2 import ListEmailJobsRequest
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import (
    CreateSuppressionRequest,
    DeleteSuppressionRequest,
    EraseRecipientRequest,
    ExportSuppressionsRequest,
    ExportSuppressionsResponse,
    GetSuppressionRequest,
    ImportSuppressionsFileRequest,
    ImportSuppressionsRequest,
    ImportSuppressionsResponse,
    SuppressionRows,
)

from tests.commands import outbox
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler
from tests.table_locks import locked


async def imported(
    scheduler: Scheduler, parts: Iterable[ImportSuppressionsRequest], **first: Any
) -> ImportSuppressionsResponse:
    opening = ImportSuppressionsRequest(**{"user_id": "ann", **first})
    answer = await scheduler.suppressions.ImportSuppressions(iter([opening, *parts]))
    assert isinstance(answer, ImportSuppressionsResponse)
    return answer


async def test_a_file_over_http_is_imported_and_its_errors_name_the_field_file(
    scheduler: Scheduler,
) -> None:
    """As a JSON transcoder forwards the body of a request, in pieces."""

    async def send(text: str, kind: str = "text/csv", **fields: Any) -> ImportSuppressionsResponse:
        async def messages() -> AsyncIterator[ImportSuppressionsFileRequest]:
            data = text.encode()
            first = HttpBody(content_type=kind, data=data[:9])
            yield ImportSuppressionsFileRequest(file=first, **{"user_id": "ann", **fields})
            yield ImportSuppressionsFileRequest(file=HttpBody(data=data[9:]))

        return await scheduler.suppressions.ImportSuppressionsFile(messages())

    text = "Made today\nKonto,reason\nann@b.org,gone\nbo@b.org,\nwrong,\n"
    options: dict[str, Any] = {"skip_lines": 1, "email_column": "Konto"}
    answer = await send(text, suppression_reason="moved", identity="me", **options)
    assert (answer.created_count, answer.rejected_count) == (2, 1)
    found, _ = await exported(scheduler)
    assert {one.email: one.reason for one in found} == {"ann@b.org": "gone", "bo@b.org": "moved"}
    assert scheduler.value("SELECT identity FROM audit_events") == "me"
    again = await send(text, **options)
    assert (again.created_count, again.existing_count) == (0, 2)
    for kind, fields, reason in (
        ("multipart/form-data; boundary=x", {}, "FILE_TYPE_INVALID"),
        ("text/csv", {}, "CSV_NO_EMAIL_COLUMN"),
        ("text/csv", {"user_id": ""}, "USER_ID_REQUIRED"),
    ):
        refusal = await refusal_of(send("name\nAnn and more\n", kind, **fields))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", reason)
        assert list(refusal.violations) in (["file"], ["user_id"])


def chunks(text: str, size: int = 7) -> list[ImportSuppressionsRequest]:
    data = text.encode()
    return [
        ImportSuppressionsRequest(chunk=data[at : at + size]) for at in range(0, len(data), size)
    ]


async def exported(
    scheduler: Scheduler, **fields: Any
) -> tuple[list[Suppression], list[ExportSuppressionsResponse]]:
    request = ExportSuppressionsRequest(**{"user_id": "ann", **fields})
    messages = [each async for each in scheduler.suppressions.ExportSuppressions(request)]
    return [one for each in messages for one in each.suppressions], messages


async def test_a_csv_is_imported_and_ends_the_waiting_mail(scheduler: Scheduler) -> None:
    sender = await scheduler.sender()
    batch = await scheduler.schedule(sender, "email\nAnn@b.org\nbob@b.org\ncleo@b.org\n")
    others = await scheduler.schedule(await scheduler.sender("bob"), "email\nann@b.org\n")
    await scheduler.suppressions.CreateSuppression(
        CreateSuppressionRequest(
            user_id="ann", suppression=Suppression(email="old@b.org", reason="first")
        )
    )
    text = (
        "\ufeffName;E-Mail;Reason\r\n"
        "Ann;ANN@b.org;complained\r\n"
        ";not an address;\r\n"
        "Old;old@b.org;again\r\n"
        "Jürgen;jürgen@müller.example;\r\n"
        "Twice;ann@B.org;later\r\n"
        f"Bob;bob@b.org;{'x' * 501}\r\n"
    )
    answer = await imported(scheduler, chunks(text), suppression_reason="moved", identity="me")
    assert (answer.created_count, answer.existing_count, answer.rejected_count) == (2, 2, 2)
    assert answer.suppressed_job_count == 1
    assert [(one.row_number, one.reason) for one in answer.rejections] == [
        (2, "ADDRESS_INVALID"),
        (6, "SUPPRESSION_REASON_INVALID"),
    ]
    found, _ = await exported(scheduler)
    assert {one.email: one.reason for one in found} == {
        "ann@b.org": "complained",
        "old@b.org": "first",
        "jürgen@müller.example": "moved",
    }
    jobs = await scheduler.jobs.ListEmailJobs(
        ListEmailJobsRequest(batch_id=batch.batch.batch_id, state=EMAIL_JOB_STATE_SUPPRESSED)
    )
    assert [job.recipient for job in jobs.email_jobs] == ["Ann@b.org"]
    # Mail of another user to the same address waits.
    assert (
        scheduler.value(
            "SELECT state FROM email_jobs WHERE batch_id = %s", int(others.batch.batch_id)
        )
        == 1
    )
    events = scheduler.rows("SELECT action, target, user_id, identity FROM audit_events")
    assert ("ImportSuppressions", "suppressions", "ann", "me") in events
    again = await imported(scheduler, chunks(text))
    assert (again.created_count, again.existing_count) == (0, 4)


async def test_an_import_of_rows_is_exported_in_order_and_resumed(scheduler: Scheduler) -> None:
    rows = [Suppression(email=f"r{n:04}@b.org", reason=str(n)) for n in range(2_500)]
    parts = [
        ImportSuppressionsRequest(rows=SuppressionRows(suppressions=rows[at : at + 900]))
        for at in range(0, len(rows), 900)
    ]
    answer = await imported(scheduler, parts)
    assert (answer.created_count, answer.rejected_count) == (2_500, 0)
    found, messages = await exported(scheduler)
    assert [(one.email, one.reason) for one in found] == [(one.email, one.reason) for one in rows]
    assert [bool(each.resume_token) for each in messages] == [True, True, False]
    for message, left in zip(messages, (1_500, 500), strict=False):
        rest, _ = await exported(scheduler, resume_token=message.resume_token)
        assert len(rest) == left
        assert rest == found[2_500 - left :]
    some, _ = await exported(scheduler, filter="reason = 2400")
    assert [one.email for one in some] == ["r2400@b.org"]
    assert (await exported(scheduler, filter="reason = none"))[0] == []
    other = ExportSuppressionsRequest(user_id="bob", resume_token=messages[0].resume_token)
    refusal = await refusal_of(scheduler.suppressions.ExportSuppressions(other).read())
    assert refusal.reason == "RESUME_TOKEN_INVALID"


async def test_an_export_to_a_csv_is_imported_exactly(scheduler: Scheduler, tmp_path: Path) -> None:
    rows = {
        "=x@example.com": "-bounced",
        "'=x@example.com": "'-bounced",
        "-x@example.com": "=cmd()",
        "+x@example.com": "@team, asked by \u00abphone\u00bb",
        "'x@example.com": " moved ",
        "x@example.com": "\U0001f469\u200d\U0001f4bb\u00a0left",
        "y@example.com": "+49 30 1234",
    }
    suppressions = [Suppression(email=email, reason=reason) for email, reason in rows.items()]
    await imported(
        scheduler, [ImportSuppressionsRequest(rows=SuppressionRows(suppressions=suppressions))]
    )
    written = await outbox(scheduler, "suppressions", "export", "--user", "ann")
    assert "\n'=x@example.com,'-bounced," in written.stdout
    file = tmp_path / "exported.csv"
    file.write_text(written.stdout)
    done = await outbox(scheduler, "suppressions", "import", str(file), "--user", "bob")
    assert done.exit_code == 0, done.stderr
    copied, _ = await exported(scheduler, user_id="bob")
    assert {one.email: one.reason for one in copied} == rows


async def test_the_command_line_limits_an_import(scheduler: Scheduler, database_url: str) -> None:
    words = ("suppressions", "import", "-", "--user", "ann", "--timeout", "500ms")
    async with locked(database_url, "suppressions"):
        done = await outbox(scheduler, *words, stdin=b"email\na@b.org\n")
    assert (done.exit_code, "no answer in time" in done.stderr) == (1, True), done.stderr


async def test_an_import_keeps_what_it_stored_when_its_caller_leaves(scheduler: Scheduler) -> None:
    never = asyncio.Event()

    async def endless() -> AsyncIterator[ImportSuppressionsRequest]:
        text = "email\n" + "".join(f"r{n}@b.org\n" for n in range(1_500))
        yield ImportSuppressionsRequest(user_id="ann", chunk=text.encode())
        await never.wait()

    call = scheduler.suppressions.ImportSuppressions(endless())

    await eventually(lambda: scheduler.value("SELECT count(*) FROM suppressions") == 1_000)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    # Its place and its thread are free: more imports than there are places.
    for _ in range(10):
        answer = await imported(scheduler, chunks("email\nx@b.org\n"))
        assert answer.created_count + answer.existing_count == 1
    assert scheduler.value("SELECT count(*) FROM suppressions") == 1_001


async def test_an_import_is_made_once_per_request_id(scheduler: Scheduler) -> None:
    text = "email,reason\n" + "".join(f"r{n}@b.org,y\n" for n in range(2_200)) + "wrong,\n"
    asked: dict[str, Any] = {"request_id": "once", "suppression_reason": "moved"}
    count = "SELECT count(*) FROM suppressions"
    # Calls at once have one answer, and store each address once.
    at_once = await asyncio.gather(
        *(imported(scheduler, chunks(text, size), **asked) for size in (999, 5_000, 99_999))
    )
    answer = at_once[0]
    assert [one for one in at_once if one != answer] == []
    assert (answer.created_count, answer.existing_count, answer.rejected_count) == (2_200, 0, 1)
    assert [one.row_number for one in answer.rejections] == [2_201]
    events = scheduler.rows("SELECT (after->>'created_count')::int FROM audit_events")
    assert sorted(n for (n,) in events) == [200, 1_000, 1_000]
    # A repeated call changes nothing, whatever has changed since.
    await scheduler.suppressions.DeleteSuppression(
        DeleteSuppressionRequest(user_id="ann", email="r7@b.org")
    )
    assert await imported(scheduler, chunks(text, 50_000), **asked) == answer
    assert scheduler.value(count) == 2_199
    # Other content, options, methods or first rows are another request.
    for changed, fields in (
        (text + "one@more.org,\n", {}),
        (text.removesuffix("wrong,\n"), {}),
        (text.replace("r0@", "x0@"), {}),
        (text.replace("r2150@b.org,y", "r2150@b.org,z"), {}),
        ("email\nr0@b.org\n", {}),
        (text, {"suppression_reason": "left"}),
        (text, {"identity": "me"}),
    ):
        again = imported(scheduler, chunks(changed, 50_000), **asked | fields)
        refusal = await refusal_of(again)
        assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    create = CreateSuppressionRequest(
        user_id="ann", suppression=Suppression(email="r7@b.org"), request_id="once"
    )
    refusal = await refusal_of(scheduler.suppressions.CreateSuppression(create))
    assert refusal.reason == "REQUEST_ID_REUSED"
    assert scheduler.value(count) == 2_199
    create.request_id = "another"
    await scheduler.suppressions.CreateSuppression(create)
    no_rows = [ImportSuppressionsRequest(rows=SuppressionRows())]
    for given in (chunks("email\nr7@b.org\n"), no_rows):
        for name in ("once", "another"):
            refusal = await refusal_of(imported(scheduler, given, request_id=name))
            assert refusal.reason == "REQUEST_ID_REUSED"
    # No rows, and another user with the same id.
    for user in ("ann", "bob"):
        for _ in range(2):
            empty = await imported(scheduler, no_rows, user_id=user, request_id="empty")
            assert empty == ImportSuppressionsResponse()
    refusal = await refusal_of(imported(scheduler, [], request_id="x" * 129))
    assert (refusal.reason, set(refusal.violations)) == ("REQUEST_ID_INVALID", {"request_id"})


async def test_an_import_that_was_interrupted_continues_with_its_request_id(
    scheduler: Scheduler,
) -> None:
    never = asyncio.Event()
    rows = [f"r{n}@b.org\n" for n in range(2_500)]

    async def broken() -> AsyncIterator[ImportSuppressionsRequest]:
        text = "email\nwrong\n" + "".join(rows[:1_500])
        yield ImportSuppressionsRequest(user_id="ann", request_id="once", chunk=text.encode())
        await never.wait()

    call = scheduler.suppressions.ImportSuppressions(broken())
    await eventually(lambda: scheduler.value("SELECT count(*) FROM suppressions") == 999)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    # One with other content among what was stored changes nothing.
    for wrong in ("email\nwrong\nx@b.org\n", "email\nwrong\n" + "".join(["x@b.org\n", *rows])):
        refusal = await refusal_of(imported(scheduler, chunks(wrong, 9_999), request_id="once"))
        assert refusal.reason == "REQUEST_ID_REUSED"
    no_rows = [ImportSuppressionsRequest(rows=SuppressionRows())]
    assert (await refusal_of(imported(scheduler, no_rows, request_id="once"))).reason == (
        "REQUEST_ID_REUSED"
    )
    assert scheduler.value("SELECT count(*) FROM suppressions") == 999
    text = "email\nwrong\n" + "".join(rows)
    answer = await imported(scheduler, chunks(text, 9_999), request_id="once")
    assert (answer.created_count, answer.existing_count, answer.rejected_count) == (2_500, 0, 1)
    assert await imported(scheduler, chunks(text, 9_999), request_id="once") == answer
    stored = scheduler.value("SELECT encode(answer, 'escape') FROM change_requests")
    assert "wrong" not in stored


async def test_a_suppression_is_found_by_any_spelling_of_its_address(scheduler: Scheduler) -> None:
    await imported(scheduler, chunks("email,reason\nJÜRGEN@example.com,=cmd\n"))

    async def get(email: str, user_id: str = "ann") -> Suppression:
        request = GetSuppressionRequest(user_id=user_id, email=email)
        answer = await scheduler.suppressions.GetSuppression(request)
        assert isinstance(answer, Suppression)
        return answer

    found = await get("jürgen@EXAMPLE.com")
    assert (found.user_id, found.reason) == ("ann", "=cmd")
    assert found.etag
    for user_id, email in (("bob", "jürgen@example.com"), ("ann", "no"), ("ann", "x@b.org")):
        refusal = await refusal_of(get(email, user_id))
        assert (refusal.code, refusal.reason) == ("NOT_FOUND", "SUPPRESSION_NOT_FOUND")
        assert refusal.message == f"{email!r} is not suppressed"
    assert (await refusal_of(get("x@b.org", ""))).reason == "USER_ID_REQUIRED"
    await scheduler.suppressions.EraseRecipient(
        EraseRecipientRequest(user_id="ann", email="jürgen@example.com")
    )
    assert (await get("jürgen@example.com")).email.startswith("erased:")
    again = await imported(scheduler, chunks("email\njürgen@example.com\n"))
    assert (again.created_count, again.existing_count) == (0, 1)


async def test_invalid_imports_are_refused(scheduler: Scheduler) -> None:
    row = ImportSuppressionsRequest(
        rows=SuppressionRows(suppressions=[Suppression(email="a@b.org")])
    )
    chunk = ImportSuppressionsRequest(chunk=b"email\na@b.org\n")
    for first, parts, reason in (
        ({}, [], "UPLOAD_OUT_OF_ORDER"),
        ({}, [row, chunk], "UPLOAD_OUT_OF_ORDER"),
        ({}, [chunk, row], "UPLOAD_OUT_OF_ORDER"),
        ({}, chunks("name\nann\n"), "CSV_NO_EMAIL_COLUMN"),
        ({}, [ImportSuppressionsRequest(chunk=b"email\n\xff\n")], "CSV_NOT_UTF8"),
        ({"skip_lines": -1}, [chunk], "SKIP_LINES_INVALID"),
        ({"email_column": "x" * 257}, [chunk], "EMAIL_COLUMN_INVALID"),
        ({"suppression_reason": "x" * 501}, [chunk], "SUPPRESSION_REASON_INVALID"),
        ({"identity": "x" * 201}, [chunk], "IDENTITY_INVALID"),
    ):
        refusal = await refusal_of(imported(scheduler, parts, **first))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", reason)
    refusal = await refusal_of(imported(scheduler, [chunk], email_column="foo"))
    assert refusal.violations == {"email_column": refusal.message}
    assert "no column 'foo', which email_column names" in refusal.message
    with pytest.raises(grpc.RpcError, match="must be set in a message"):
        await scheduler.suppressions.ImportSuppressions(iter([]))
    assert scheduler.value("SELECT count(*) FROM suppressions") == 0


async def test_suppressions_have_a_quota_that_no_erasure_needs(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url, user_suppressions=1_420) as scheduler:

        async def create(email: str, user_id: str = "ann") -> Suppression:
            suppression = Suppression(email=email)
            return await scheduler.suppressions.CreateSuppression(
                CreateSuppressionRequest(user_id=user_id, suppression=suppression)
            )

        # As an older release stored it: the first call counts it.
        scheduler.execute(
            "INSERT INTO suppressions (user_id, address) SELECT 'ann', n || '@old.org'"
            " FROM generate_series(1, 400) n"
        )
        csv = "email\n" + "".join(f"{n}@b.org\n" for n in range(2_000))
        refusal = await refusal_of(imported(scheduler, chunks(csv, 10_000)))
        assert (refusal.code, refusal.reason) == (
            "RESOURCE_EXHAUSTED",
            "USER_SUPPRESSIONS_EXCEEDED",
        )
        assert refusal.metadata == {
            "user": "ann",
            "limit": "1420",
            "current": "1400",
            "created_count": "1000",
        }
        count = "SELECT count(*) FROM suppressions WHERE user_id = 'ann'"
        assert scheduler.value(count) == 1_400
        made = await asyncio.gather(
            *(create(f"{n}@c.org") for n in range(40)), return_exceptions=True
        )
        assert len([one for one in made if isinstance(one, Suppression)]) == 20
        assert scheduler.value(count) == 1_420
        refusal = await refusal_of(create("x@c.org"))
        assert refusal.reason == "USER_SUPPRESSIONS_EXCEEDED"
        # What is suppressed already needs no place, and others have their own.
        assert await create("1@old.org")
        assert (await imported(scheduler, chunks("email\n1@b.org\n"))).existing_count == 1
        assert await create("x@c.org", "bob")
        await scheduler.suppressions.EraseRecipient(
            EraseRecipientRequest(user_id="ann", email="gone@c.org")
        )
        for email in ("1@b.org", "2@b.org"):
            await scheduler.suppressions.DeleteSuppression(
                DeleteSuppressionRequest(user_id="ann", email=email)
            )
        assert await create("x@c.org")
        stored = dict(scheduler.rows("SELECT user_id, n FROM suppression_counts"))
        assert stored == {"ann": scheduler.value(count), "bob": 1}
