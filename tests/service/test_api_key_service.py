"""ApiKeyService: keys that operators create over gRPC, with an expiry, and for reading only."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1.api_key_pb2 import (
    API_KEY_KIND_OPERATOR,
    API_KEY_KIND_SERVICE,
    API_KEY_KIND_USER,
    ApiKey,
)
from outbox.v1.api_key_service_pb2 import (
    CreateApiKeyRequest,
    CreateApiKeyResponse,
    GetApiKeyRequest,
    ListApiKeysRequest,
    RevokeApiKeyRequest,
)
from outbox.v1.batch_service_pb2 import ListBatchesRequest, UploadBatchRequest
from outbox.v1.email_job_service_pb2 import ExportEmailJobsRequest
from outbox.v1.sender_pb2 import Sender
from outbox.v1.sender_service_pb2 import CreateSenderRequest, ListSendersRequest
from outbox.v1.user_service_pb2 import ListUsersRequest

from outbox_server.shared.auth.authenticator import KeyAuthenticator
from tests.commands import run
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, options_for, refusal_of
from tests.two_users import Metadata, Rivals, rivals

SHORT: Final = timedelta(milliseconds=50)


@pytest.fixture
async def both(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Rivals]:
    # test_api_keys.py checks that the cache keeps a key for the promised time.
    monkeypatch.setattr(KeyAuthenticator.__init__, "__defaults__", (SHORT,))
    async with rivals(database_url, redis_url) as running:
        yield running


def bearer(secret: str) -> Metadata:
    return (("authorization", f"Bearer {secret}"),)


async def create(both: Rivals, request_id: str = "", **fields: Any) -> CreateApiKeyResponse:
    request = CreateApiKeyRequest(api_key=ApiKey(**fields), request_id=request_id)
    answer = await both.scheduler.api_keys.CreateApiKey(request, metadata=both.operator)
    assert isinstance(answer, CreateApiKeyResponse)
    return answer


async def is_refused(scheduler: Scheduler, secret: str) -> bool:
    try:
        await scheduler.senders.ListSenders(ListSendersRequest(), metadata=bearer(secret))
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.UNAUTHENTICATED
    return False


async def test_a_key_works_until_it_is_revoked_and_its_secret_is_returned_once(
    both: Rivals,
) -> None:
    scheduler = both.scheduler
    fields = {"kind": API_KEY_KIND_USER, "user_id": "cleo", "display_name": "web"}
    made = await create(both, "once", **fields)
    assert made.secret.startswith(f"obx_{made.api_key.api_key_id}_")
    assert not await is_refused(scheduler, made.secret)
    again = await create(both, "once", **fields)
    assert (again.api_key.api_key_id, again.secret) == (made.api_key.api_key_id, "")
    # Neither the stored answer nor the audit log has the secret.
    part = made.secret.split("_", 2)[2]
    for table in ("change_requests", "audit_events", "api_keys"):
        texts = str(scheduler.rows(f"SELECT t::text FROM {table} AS t"))
        assert part not in texts
        assert part.encode().hex() not in texts
    which = ListApiKeysRequest(user_id="cleo")
    (listed,) = (await scheduler.api_keys.ListApiKeys(which, metadata=both.operator)).api_keys
    assert (listed.display_name, listed.read_only) == ("web", False)
    everyone = await scheduler.api_keys.ListApiKeys(ListApiKeysRequest(), metadata=both.operator)
    assert {key.user_id for key in everyone.api_keys} == {"ann", "eve", "cleo", ""}

    revoke = RevokeApiKeyRequest(api_key_id=listed.api_key_id, reason="lost")
    revoked = await scheduler.api_keys.RevokeApiKey(revoke, metadata=both.operator)
    assert revoked.HasField("revoke_time")
    await eventually(lambda: is_refused(scheduler, made.secret))
    second = await scheduler.api_keys.RevokeApiKey(revoke, metadata=both.operator)
    assert second.revoke_time == revoked.revoke_time
    events = scheduler.rows("SELECT action, user_id, reason FROM audit_events ORDER BY id")
    assert events == [("CreateApiKey", "cleo", ""), ("RevokeApiKey", "cleo", "lost")]


async def test_a_key_stops_when_it_expires(both: Rivals) -> None:
    expiry = Timestamp()
    expiry.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    made = await create(both, kind=API_KEY_KIND_USER, user_id="cleo", expire_time=expiry)
    assert made.api_key.expire_time.ToMilliseconds() == expiry.ToMilliseconds()
    assert not await is_refused(both.scheduler, made.secret)
    both.scheduler.execute(
        "UPDATE api_keys SET expires_at = now() WHERE key_id = %s", made.api_key.api_key_id
    )
    await eventually(lambda: is_refused(both.scheduler, made.secret))


async def test_a_key_that_only_reads_changes_nothing(both: Rivals) -> None:
    scheduler = both.scheduler
    reader = await create(both, kind=API_KEY_KIND_SERVICE, read_only=True)
    key = bearer(reader.secret)
    sender = await both.sender(both.ann)
    listed = await scheduler.batches.ListBatches(ListBatchesRequest(user_id="ann"), metadata=key)
    assert not listed.batches
    export = ExportEmailJobsRequest(user_id="ann")
    assert [each async for each in scheduler.jobs.ExportEmailJobs(export, metadata=key)]
    request = CreateSenderRequest(user_id="ann", sender=Sender(email="x@example.com"))
    upload = iter([UploadBatchRequest(options=options_for(sender))])
    for call in (
        scheduler.senders.CreateSender(request, metadata=key),
        scheduler.batches.UploadBatch(upload, metadata=key),
    ):
        refusal = await refusal_of(call)
        assert (refusal.code, refusal.reason) == ("PERMISSION_DENIED", "READ_ONLY_KEY")
    # It is no operator's key either.
    call = both.users.ListUsers(ListUsersRequest(), metadata=key)
    assert (await refusal_of(call)).reason == "OPERATOR_REQUIRED"
    operator = await create(both, kind=API_KEY_KIND_OPERATOR, read_only=True)
    assert (await both.users.ListUsers(ListUsersRequest(), metadata=bearer(operator.secret))).users
    wanted = CreateApiKeyRequest(api_key=ApiKey(kind=API_KEY_KIND_OPERATOR))
    creation = scheduler.api_keys.CreateApiKey(wanted, metadata=bearer(operator.secret))
    assert (await refusal_of(creation)).reason == "READ_ONLY_KEY"


async def test_only_operators_manage_keys_and_wrong_keys_are_refused(both: Rivals) -> None:
    keys = both.scheduler.api_keys
    own = CreateApiKeyRequest(api_key=ApiKey(kind=API_KEY_KIND_USER, user_id="ann"))
    for caller in (both.ann, both.service):
        for call in (
            keys.CreateApiKey(own, metadata=caller),
            keys.ListApiKeys(ListApiKeysRequest(), metadata=caller),
        ):
            assert (await refusal_of(call)).reason == "OPERATOR_REQUIRED"
    past = Timestamp(seconds=1)
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({}, "API_KEY_KIND_INVALID", "api_key.kind"),
        ({"kind": 9}, "API_KEY_KIND_INVALID", "api_key.kind"),
        ({"kind": 2, "user_id": "ann"}, "API_KEY_KIND_INVALID", "api_key.user_id"),
        ({"kind": 1}, "USER_ID_REQUIRED", "api_key.user_id"),
        ({"kind": 1, "user_id": "a\nb"}, "USER_ID_INVALID", "api_key.user_id"),
        ({"kind": 2, "expire_time": past}, "EXPIRE_TIME_INVALID", "api_key.expire_time"),
        ({"kind": 2, "display_name": "a\nb"}, "DISPLAY_NAME_INVALID", "api_key.display_name"),
    ]
    for fields, reason, field in wrong:
        refusal = await refusal_of(create(both, **fields))
        assert (refusal.reason, list(refusal.violations)) == (reason, [field])
    # All at once.
    every = {name: value for fields, *_ in wrong[1:] for name, value in fields.items()}
    refusal = await refusal_of(create(both, **every | {"kind": 9}))
    assert set(refusal.violations) == {
        *("api_key.kind", "api_key.user_id", "api_key.expire_time", "api_key.display_name")
    }
    for text in ("", "k7m2p4x9qa", "a\0b", "x" * 64):
        reason = "API_KEY_NOT_FOUND" if text else "API_KEY_ID_REQUIRED"
        read = keys.GetApiKey(GetApiKeyRequest(api_key_id=text), metadata=both.operator)
        assert (await refusal_of(read)).reason == reason
        revoke = keys.RevokeApiKey(RevokeApiKeyRequest(api_key_id=text), metadata=both.operator)
        assert (await refusal_of(revoke)).reason == reason


async def test_the_command_line_manages_keys_over_the_network(
    both: Rivals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_API_KEY", both.operator[0][1].removeprefix("Bearer "))

    async def keys(*words: str) -> Any:
        command = ["api-keys", *words, "--server", both.scheduler.address, "-o", "json"]
        done = await asyncio.to_thread(run, command)
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    made = await keys("create", "--user", "cleo", "--read-only", "--expire-time", "in 1h")
    key_id = made["api_key"]["api_key_id"]
    (listed,) = (await keys("list", "--user", "cleo"))["api_keys"]
    assert (listed["api_key_id"], listed["read_only"]) == (key_id, True)
    assert (await keys("revoke", made["secret"]))["revoke_time"]
    # The same keys, as read from the database, in a table.
    monkeypatch.setenv("OUTBOX_DATABASE_URL", both.scheduler.settings.database_url)
    table = await asyncio.to_thread(run, ["keys", "list"])
    (line,) = (each for each in table.stdout.splitlines() if key_id in each)
    assert line.split()[-1] == "yes", table.stderr
