"""Every method of every service, called with one user's key for resources of another user.

The methods come from the servers' reflection, so that new methods are tested too.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from outbox.v1 import batch_pb2, batch_service_pb2, sender_pb2, sender_service_pb2
from outbox.v1.dispatcher_service_pb2 import DESCRIPTOR as DISPATCHER

from outbox_server.shared.auth.keys import ApiKeyKind, make_key
from outbox_server.shared.auth.store import insert_key
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.secrets import generate_key
from outbox_server.shared.settings import load_settings
from outbox_server.shared.states import JobState
from tests import cooldowns
from tests.dispatchers import options, running, settings_of
from tests.eventually import PATIENCE
from tests.fingerprint import Fingerprint
from tests.scheduler_stack import Scheduler, options_for, refusal_of, running_scheduler
from tests.stats_stack import stats_server

# An id of a resource that does not exist, with as many digits as the ids that exist.
# As long as a real id, because the length is part of the printed answer.
NOWHERE: Final = "3000000000987654321"
# A part of all of Ann's texts. It must not appear in any answer to Bob.
HERS: Final = "annas-secret"

# Valid values by field name, for the other fields of a request.
RIGHT: Final[Mapping[str, Any]] = {
    "subject": "Hello",
    "body": "Good day",
    "csv": b"email\na@b.org\n",
    "chunk": b"email\na@b.org\n",
    "email": "x@y.org",
    "recipient_count": 1,
    "paths": "display_name",
    "display_name": "Taken over",
    "resolution": 1,
    "force": True,
    "url": "https://example.com/hook",
    "schedule_time": Timestamp(seconds=2_000_000_000),
    "delay": Duration(seconds=60),
    "headers": batch_pb2.MailHeader(name="X-Walk", value="on"),
}
# They are about the server and not about resources of a user, so they have no user id.
OF_NO_USER: Final = {"BeginHold", "GetServerInfo", "ListUsers", "GetApiKey", "RevokeApiKey"}
# Only operators may call these, whichever user is named.
FOR_OPERATORS: Final = {
    *("GetUser", "ListUsers", "UpdateUser", "ListAuditEvents"),
    *("CreateApiKey", "GetApiKey", "ListApiKeys", "RevokeApiKey"),
    *("BeginHold", "CancelHeldJobs", "GetHold", "ReleaseHeldJobs"),
}
# The quotas equal what each user has, so every further job or sender is refused.
QUOTAS: Final = {"user_senders": 1, "user_waiting_jobs": 4, "user_stored_rejections": 1}
IDS: Final = (
    *("sender_id", "batch_id", "email_job_id", "email_job_ids"),
    *("webhook_id", "webhook_delivery_id"),
)


@dataclass(frozen=True)
class OwnedResources:
    """The resources of a user, by the names of their id fields."""

    sender_id: str
    batch_id: str
    # One job for each state that a method may require.
    job_ids: tuple[str, ...]
    webhook_id: str
    delivery_id: str

    def ids(self, job: int = 0) -> dict[str, str]:
        picked = self.job_ids[job]
        others = (self.webhook_id, self.delivery_id)
        found = (self.sender_id, self.batch_id, picked, picked, *others)
        return dict(zip(IDS, found, strict=True))


class TwoUsers:
    """Both servers, Ann with every kind of resource, and Bob with his key."""

    def __init__(
        self,
        scheduler: Scheduler,
        channels: list[grpc.aio.Channel],
        bob: str,
        hers: OwnedResources,
        his: OwnedResources,
    ) -> None:
        self.scheduler = scheduler
        self.channels = channels
        self.metadata = _bearer(bob)
        self.hers = hers
        self.his = his
        # A call of Bob's that changes nothing is remembered by its id, among his.
        self.fingerprint = Fingerprint(scheduler, but=["change_requests"])

    async def methods(self) -> list[tuple[MethodDescriptor, grpc.aio.Channel]]:
        found = []
        for channel in self.channels:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            async for answer in stub.ServerReflectionInfo(asked):
                for service in answer.list_services_response.service:
                    if not service.name.startswith("grpc."):
                        known = descriptor_pool.Default().FindServiceByName(service.name)
                        found += [(method, channel) for method in known.methods]
        return found

    async def ask(
        self, method: MethodDescriptor, channel: grpc.aio.Channel, messages: list[Message]
    ) -> str:
        """Return everything that Bob receives, as text."""
        path = f"/{method.containing_service.full_name}/{method.name}"
        encoded = [message.SerializeToString() for message in messages]
        answer_type = message_factory.GetMessageClass(method.output_type)
        kwargs: Any = {"metadata": self.metadata, "timeout": PATIENCE}
        call: Any
        try:
            if method.server_streaming:
                call = channel.unary_stream(path)
                stream = call(encoded[0], **kwargs)
                answer = await stream.read()
                stream.cancel()
            elif method.client_streaming:
                call = channel.stream_unary(path)
                answer = await call(iter(encoded), **kwargs)
            else:
                call = channel.unary_unary(path)
                answer = await call(encoded[0], **kwargs)
        except grpc.aio.AioRpcError as error:
            status = rpc_status.from_call(error)
            return f"{error.code().name}: {status or error.details()}"
        return f"OK: {answer_type.FromString(answer)}"


def requests(
    method: MethodDescriptor, ids: Mapping[str, str], user_id: str = ""
) -> Iterator[list[Message]]:
    """Yield requests with all of `ids` for which the method has a field, one for each choice."""
    choices = max([1, *(len(one.fields) for one in method.input_type.oneofs)])
    made: list[Any] = [_filled(method.input_type, ids, user_id, each) for each in range(choices)]
    for one in made:
        if method.name == "UpdateBatch":
            one.update_mask.paths[:] = ["subject"]
            # Only the id of the batch says what is changed.
            one.batch.ClearField("sender_id")
        elif method.name == "UpdateWebhook":
            one.update_mask.paths[:] = ["url"]
    # The messages of an upload belong to one request; otherwise each message is a request.
    yield from [made] if method.client_streaming else ([message] for message in made)


def _filled(kind: Descriptor, ids: Mapping[str, str], user_id: str, choice: int) -> Message:
    message: Message = message_factory.GetMessageClass(kind)()
    for field in kind.fields:
        oneof = field.containing_oneof
        # A synthetic oneof represents `optional`.
        if oneof and len(oneof.fields) > 1 and list(oneof.fields).index(field) != choice:
            continue
        value = _value(field, ids, user_id)
        if value is not None:
            if field.is_repeated:
                getattr(message, field.name).append(value)
            elif field.message_type:
                getattr(message, field.name).CopyFrom(value)
            else:
                setattr(message, field.name, value)
        elif field.message_type and _is_ours(field.message_type):
            inner = _filled(field.message_type, ids, user_id, 0)
            if field.is_repeated:
                getattr(message, field.name).append(inner)
            elif inner.ByteSize():
                getattr(message, field.name).CopyFrom(inner)
    return message


def _is_ours(kind: Descriptor) -> bool:
    ours = kind.file.package == "outbox.v1" and not kind.GetOptions().map_entry
    return ours or kind.name == "FieldMask"


_numbers = itertools.count(1)
_thousands = itertools.count(500_000_001, 1_000_000)


def _value(field: FieldDescriptor, ids: Mapping[str, str], user_id: str) -> Any:
    if field.name == "user_id":
        return user_id or None
    if field.name == "request_id":
        return f"walk-{next(_numbers)}"
    if field.name in ids:
        return ids[field.name]
    value = RIGHT.get(field.name)
    # Of a field of this type; others may have the same name.
    return value if isinstance(value, Message) == bool(field.message_type) else None


def _names(kind: Descriptor, seen: frozenset[str] = frozenset()) -> set[str]:
    """Return the names of all fields of a message, at any depth."""
    found = set()
    for field in kind.fields:
        found.add(field.name)
        inner = field.message_type
        if inner and inner.full_name not in seen and _is_ours(inner):
            found |= _names(inner, seen | {inner.full_name})
    return found


async def _world(scheduler: Scheduler, user_id: str, address: str, service: str) -> OwnedResources:
    """Create a sender with a batch: one job has failed, one is uncertain, and some wait."""
    metadata = _bearer(service)
    sender = await scheduler.senders.CreateSender(
        sender_service_pb2.CreateSenderRequest(
            user_id=user_id, sender=sender_pb2.Sender(email=address, display_name=address)
        ),
        metadata=metadata,
    )
    rows = "".join(f"{n}-{address}\n" for n in range(4))
    accepted = await scheduler.batches.ScheduleBatch(
        batch_service_pb2.ScheduleBatchRequest(
            options=options_for(sender, subject=address), csv=f"email\n{rows}broken\n".encode()
        ),
        metadata=metadata,
    )
    batch_id = accepted.batch.batch_id
    found = scheduler.rows(
        "SELECT id FROM email_jobs WHERE batch_id = %s ORDER BY id", int(batch_id)
    )
    jobs = [job for (job,) in found]
    for job, state in zip(jobs, (JobState.FAILED, JobState.UNCERTAIN), strict=False):
        scheduler.execute(
            "UPDATE email_jobs SET state = %s, finished_at = now(), attempt = 1 WHERE id = %s",
            state,
            job,
        )
        scheduler.execute(
            "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
            " counted, message) VALUES (%s, 1, %s, now(), now(), 3, true, %s)",
            job,
            int(sender.sender_id),
            address,
        )
    cooldowns.begin(scheduler.execute, sender.sender_id, message=address)
    webhook, delivery = int(batch_id) + 1, int(batch_id) + 2
    scheduler.execute(
        "INSERT INTO webhooks (id, user_id, url, secret, disabled, after_event, error)"
        " VALUES (%s, %s, 'https://example.com', '', true, 0, %s)",
        *(webhook, user_id, address),
    )
    scheduler.execute(
        "INSERT INTO webhook_deliveries (id, webhook_id, after_event, last_event, event_count,"
        " error) VALUES (%s, %s, 0, 1, 1, %s)",
        *(delivery, webhook, address),
    )
    return OwnedResources(
        sender.sender_id, batch_id, tuple(map(str, jobs[:3])), str(webhook), str(delivery)
    )


async def _keys(database_url: str, users: list[str]) -> dict[str, str]:
    """Store a key of each user, and one of a service; return their texts by user."""
    engine = create_engine(load_settings(database_url=database_url))
    made = {}
    async with engine.begin() as connection:
        for name in (*users, "service"):
            key = make_key()
            kind = ApiKeyKind.SERVICE if name == "service" else ApiKeyKind.USER
            await insert_key(connection, key, kind, None if name == "service" else name, "")
            made[name] = key.text
    await engine.dispose()
    return made


def _bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


@pytest.fixture
async def walk(database_url: str, redis_url: str) -> AsyncIterator[TwoUsers]:
    async with AsyncExitStack() as stack:
        keys = await _keys(database_url, ["bob"])
        scheduler = await stack.enter_async_context(
            running_scheduler(database_url, redis_url, auth="keys", **QUOTAS)
        )
        # The rows that a first call writes exist already, and no id is a part of another number.
        scheduler.execute("INSERT INTO installation DEFAULT VALUES ON CONFLICT DO NOTHING")
        scheduler.execute("UPDATE api_keys SET last_used_at = now() + interval '1 d'")
        for table in ("senders", "batches", "email_jobs"):
            await scheduler.define(f"ALTER TABLE {table} ALTER id RESTART {next(_thousands)}")
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(scheduler.address)),
            await stack.enter_async_context(stats_server(database_url, redis_url, auth="keys")),
        ]
        hers = await _world(scheduler, "ann", f"{HERS}@example.com", keys["service"])
        his = await _world(scheduler, "bob", "bob@example.com", keys["service"])
        scheduler.execute(
            "INSERT INTO suppressions (user_id, address, reason) VALUES ('ann', 'x@y.org', %s)",
            HERS,
        )
        yield TwoUsers(scheduler, channels, keys["bob"], hers, his)


def forbidden_requests(
    walk: TwoUsers, method: MethodDescriptor
) -> Iterator[tuple[list[str], list[Message], list[Message]]]:
    """Yield ids of Ann's, a request of Bob's with them, and one with ids that do not exist."""
    if method.name.startswith("Create"):
        return  # the server assigns the ids of new resources
    named = tuple(name for name in IDS if name in _names(method.input_type))
    # All of Ann's ids at once, and each of them together with Bob's other ids.
    choices = {named, *((name,) for name in named)} - {()}
    jobs = len(walk.hers.job_ids) if any("job" in name for name in named) else 1
    for foreign, job in itertools.product(choices, range(jobs)):
        his = walk.his.ids(job)
        hers = {name: walk.hers.ids(job)[name] for name in foreign}
        nowhere: dict[str, str] = dict.fromkeys(foreign, NOWHERE)
        ids = list(hers.values())
        pairs = zip(requests(method, his | hers), requests(method, his | nowhere), strict=True)
        for forbidden, missing in pairs:
            # Otherwise the request has another field of the oneof.
            if any(one in str(forbidden) for one in ids):
                yield ids, forbidden, missing


async def test_resources_of_another_user_are_not_found(walk: TwoUsers) -> None:
    answers: dict[str, set[str]] = defaultdict(set)
    before = await walk.fingerprint.take()
    for method, channel in await walk.methods():
        for ids, forbidden, missing in forbidden_requests(walk, method):
            reported = await walk.ask(method, channel, forbidden)
            about = f"{method.full_name} {forbidden}: {reported}"
            assert await walk.fingerprint.take() == before, about
            assert HERS not in reported, about
            # The answer is identical to that for a resource that does not exist.
            expected = await walk.ask(method, channel, missing)
            for one in ids:
                reported = reported.replace(one, NOWHERE)
            assert reported == expected, about
            answers[method.name].add(reported.partition(":")[0])
    owners = walk.scheduler.rows("SELECT DISTINCT scope, user_id FROM change_requests")
    assert set(owners) <= {("bob", "bob"), ("bob", None)}
    filters = {"ListSenders", "ListBatches", "ListEmailJobs", "RetryEmailJobs"}
    filters |= {"CancelEmailJobs", "RescheduleEmailJobs", "ExportEmailJobs"}
    for name, codes in answers.items():
        # A filter that matches nothing is not an error.
        allowed = {"NOT_FOUND", "PERMISSION_DENIED"} | ({"OK"} if name in filters else set())
        assert codes <= allowed or codes == {"UNIMPLEMENTED"}, f"{name}: {codes}"
    assert {"GetSender", "UploadBatch", "ListAttempts", "GetSenderStats"} <= answers.keys()


async def test_another_users_id_is_a_mismatch_in_every_method(walk: TwoUsers) -> None:
    before = await walk.fingerprint.take()
    for method, channel in await walk.methods():
        if method.name in OF_NO_USER:
            assert "user_id" not in _names(method.input_type)
            continue
        for messages in requests(method, walk.hers.ids(), user_id="ann"):
            reported = await walk.ask(method, channel, messages)
            reason = "OPERATOR_REQUIRED" if method.name in FOR_OPERATORS else "USER_MISMATCH"
            assert reported.startswith("UNIMPLEMENTED") or (
                reported.startswith("PERMISSION_DENIED") and reason in reported
            ), f"{method.full_name} {messages}: {reported}"
    assert await walk.fingerprint.take() == before


async def test_an_unset_user_id_selects_the_callers_own_resources(walk: TwoUsers) -> None:
    for method, channel in await walk.methods():
        for messages in requests(method, walk.his.ids()):
            reported = await walk.ask(method, channel, messages)
            assert HERS not in reported, f"{method.full_name}: {reported}"
    assert walk.scheduler.rows("SELECT user_id, reason FROM suppressions WHERE reason <> ''") == [
        ("ann", HERS)
    ]
    assert walk.scheduler.rows("SELECT state FROM senders WHERE user_id = 'ann'") == [(1,)]


async def answers_of_bob(database_url: str, redis_url: str, others: list[str]) -> dict[str, str]:
    """Return what Bob receives from all methods for his own resources, beside other users."""
    async with AsyncExitStack() as stack:
        users = [*others, "bob"]
        keys = await _keys(database_url, users)
        scheduler = await stack.enter_async_context(
            running_scheduler(database_url, redis_url, auth="keys", encryption_keys=generate_key())
        )
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(scheduler.address)),
            await stack.enter_async_context(stats_server(database_url, redis_url, auth="keys")),
        ]
        owned = {
            user: await _world(scheduler, user, f"{user}@example.com", keys["service"])
            for user in users
        }
        found: dict[str, str] = {}
        for user in users:
            walk = TwoUsers(scheduler, channels, keys[user], owned[user], owned[user])
            if user != "bob":
                await _use_oauth2(walk)
            methods = sorted(await walk.methods(), key=lambda each: (_ends(each[0]), each[0].name))
            for method, channel in methods:
                for number, messages in enumerate(requests(method, owned[user].ids())):
                    if not (user != "bob" and _ends(method)):
                        answer = await walk.ask(method, channel, messages)
                        found[f"{method.name} {number}"] = answer
        return Unnamed().texts(found)


def _ends(method: MethodDescriptor) -> bool:
    """Return whether the method removes what later calls need."""
    return method.name.startswith(("Cancel", "Delete", "Erase"))


async def _use_oauth2(walk: TwoUsers) -> None:
    credentials = sender_pb2.OAuth2Credentials(
        token_url="https://login.example.com/token",
        client_id="their-client",
        client_secret="their-secret",
        refresh_token="their-token",
    )
    sender = sender_pb2.Sender(
        email="o@example.com",
        smtp=sender_pb2.SmtpEndpoint(
            host="mail.example.com",
            security=sender_pb2.SMTP_SECURITY_TLS,
            username="them",
            oauth2=credentials,
        ),
    )
    request = sender_service_pb2.CreateSenderRequest(sender=sender)
    await walk.scheduler.senders.CreateSender(request, metadata=walk.metadata)


class Unnamed:
    """Replaces ids by their order of appearance, and leaves out times and tokens."""

    _LEFT_OUT: Final = re.compile(
        # Request ids, times, the installation in Message-IDs, secrets and tokens.
        r"(walk|request)-\d+|seconds: [12]\d{9}|nanos: \d+|\d{4}-\d\d-\d\d[T ][\d:.]+|Date: [^\\]+"
        r"|\.[0-9a-f]{12}@|whsec_[^\"]+|_token: .+|erased:[0-9a-f]+"
        # Whether Outbox has tried to reach a webhook yet.
        r"|  failing_since_time {[^}]*}\n|  last_error: .+\n"
    )

    def __init__(self) -> None:
        self._ids: dict[str, str] = {}

    def texts(self, found: Mapping[str, str]) -> dict[str, str]:
        return {
            name: re.sub(r"\d{15,}", self._number, self._LEFT_OUT.sub("...", text))
            for name, text in found.items()
        }

    def _number(self, found: re.Match[str]) -> str:
        return self._ids.setdefault(found[0], f"id-{len(self._ids)}")


async def test_answers_are_the_same_beside_other_users(
    new_database: Callable[[], str], redis_url: str
) -> None:
    alone = await answers_of_bob(new_database(), redis_url, [])
    beside = await answers_of_bob(new_database(), redis_url, ["ann", "eve"])
    assert alone.keys() == beside.keys()
    different = {name: text for name, text in beside.items() if text != alone[name]}
    assert different == {name: alone[name] for name in different}


async def test_the_dispatcher_has_no_method_for_users_and_services(
    database_url: str, redis_url: str
) -> None:
    engine = create_engine(load_settings(database_url=database_url))
    keys = {ApiKeyKind.USER: make_key(), ApiKeyKind.SERVICE: make_key()}
    async with engine.begin() as connection:
        for kind, key in keys.items():
            user_id = "ann" if kind is ApiKeyKind.USER else None
            await insert_key(connection, key, kind, user_id, "")
    await engine.dispose()
    values = options(database_url, redis_url, "smtp://127.0.0.1:9", auth="keys")
    async with running(settings_of(values)) as dispatcher:
        for method in DISPATCHER.services_by_name["DispatcherService"].methods:
            request = message_factory.GetMessageClass(method.input_type)()
            for key in keys.values():
                call = getattr(dispatcher.stub, method.name)
                refusal = await refusal_of(call(request, metadata=_bearer(key.text)))
                assert (refusal.code, refusal.reason) == ("PERMISSION_DENIED", "OPERATOR_REQUIRED")
