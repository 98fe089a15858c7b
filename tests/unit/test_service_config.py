"""The published service config, and the levels in the protos that it is made from."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from google.api.annotations_pb2 import http
from google.protobuf.descriptor_pb2 import FileDescriptorSet, MethodDescriptorProto, MethodOptions
from outbox_client import AsyncClient

from docs.build_service_config import BULK, SOURCE, TARGET, TIMEOUTS, MethodKind, build, kind_of

RELEASED: Final = Path(__file__).parents[2] / ".ci" / "released-contract.binpb"
READ: Final = MethodOptions.NO_SIDE_EFFECTS
UNKNOWN: Final = MethodOptions.IDEMPOTENCY_UNKNOWN
# A second call of these does more than the first one, or fails.
NOT_REPEATABLE: Final = (
    "CreateSender",
    "DeleteSender",
    "DeleteSuppression",
    "RescheduleEmailJobs",
    "ResolveEmailJob",
    "RetryEmailJobs",
)


def methods(image: Path = SOURCE) -> Iterator[tuple[str, MethodDescriptorProto]]:
    for file in FileDescriptorSet.FromString(image.read_bytes()).file:
        for service in file.service:
            for method in service.method:
                yield f"{file.package}.{service.name}/{method.name}", method


def is_read(method: MethodDescriptorProto) -> bool:
    rule = method.options.Extensions[http]
    return any(each.HasField("get") for each in (rule, *rule.additional_bindings))


def config() -> dict[str, dict[str, Any]]:
    """Return the published config of each method."""
    document = json.loads(TARGET.read_text(encoding="utf-8"))
    return {
        f"{name['service']}/{name['method']}": each
        for each in document["methodConfig"]
        for name in each["name"]
    }


def test_the_published_file_is_made_from_the_protos() -> None:
    text = build(FileDescriptorSet.FromString(SOURCE.read_bytes()))
    assert TARGET.read_text(encoding="utf-8") == text, "run `make docs`"


def test_every_method_that_only_reads_has_no_side_effects() -> None:
    wrong = [
        path
        for path, method in methods()
        if is_read(method) and method.options.idempotency_level != READ
    ]
    assert wrong == []


def test_a_method_that_may_not_be_repeated_takes_a_request_id() -> None:
    # A new method is of one of three kinds: NO_SIDE_EFFECTS, IDEMPOTENT, or with a `request_id`.
    contract = FileDescriptorSet.FromString(SOURCE.read_bytes())
    with_id = {
        f".{file.package}.{message.name}"
        for file in contract.file
        for message in file.message_type
        if any(field.name == "request_id" for field in message.field)
    }
    wrong = [
        path
        for path, method in methods()
        if method.options.idempotency_level == UNKNOWN and method.input_type not in with_id
    ]
    assert wrong == []


def test_no_method_loses_its_released_level() -> None:
    now = {path: method.options.idempotency_level for path, method in methods()}
    before = {path: method.options.idempotency_level for path, method in methods(RELEASED)}
    lost = [path for path, level in before.items() if level not in (UNKNOWN, now[path])]
    assert lost == []


def test_exactly_the_methods_that_may_be_repeated_are_retried() -> None:
    published = config()
    for path, method in methods():
        level = method.options.idempotency_level
        assert ("retryPolicy" in published.get(path, {})) == (level != UNKNOWN), path
        if path.rpartition("/")[2] in NOT_REPEATABLE:
            assert level == UNKNOWN, path
    # No status after which an identical call would fail again.
    codes = {tuple(each["retryPolicy"]["retryableStatusCodes"])
             for each in published.values() if "retryPolicy" in each}  # fmt: skip
    assert codes == {("UNAVAILABLE",)}


# A change of one thing. Whatever else may change many rows is in BULK.
SMALL_CHANGES: Final = frozenset(
    {
        *("CancelEmailJob", "ResolveEmailJob", "ScheduleBatch", "SendTestEmail"),
        *("CreateApiKey", "CreateSender", "CreateWebhook", "DeleteSuppression", "DeleteWebhook"),
        *("PauseBatch", "PauseSender", "ResumeBatch", "ResumeSender", "RevokeApiKey"),
        "RotateWebhookSecret",
        *("TestWebhook", "UpdateSender", "UpdateUser", "UpdateWebhook", "VerifySender"),
    }
)


def test_methods_of_one_kind_have_one_deadline() -> None:
    # A new method that changes something must be named as one kind or the other.
    published = config()
    found: dict[MethodKind, set[str]] = {kind: set() for kind in MethodKind}
    for path, method in methods():
        kind = kind_of(method)
        found[kind].add(method.name)
        assert published[path].get("timeout") == TIMEOUTS.get(kind), path
    assert found[MethodKind.CHANGE] == SMALL_CHANGES
    assert found[MethodKind.BULK] == BULK
    assert {"GetSender", "ListEmailJobs", "PreviewBatch"} <= found[MethodKind.READ]
    assert {"WatchBatch", "ExportEmailJobs"} <= found[MethodKind.STREAM]


def test_all_calls_have_a_deadline_but_streams_of_the_server() -> None:
    published = config()
    for path, method in methods():
        assert ("timeout" in published[path]) != method.server_streaming, path
    defaults = inspect.signature(AsyncClient).parameters
    create = published["outbox.v1.SenderService/CreateSender"]
    upload = published["outbox.v1.BatchService/UploadBatch"]
    assert (create["timeout"], defaults["timeout"].default) == ("30s", None)
    assert upload["timeout"] == f"{defaults['upload_timeout'].default:g}s"
