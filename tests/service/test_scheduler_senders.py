"""SenderService, over a real channel, on real stores."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from outbox.v1 import email_job_service_pb2, sender_pb2
from outbox.v1.sender_service_pb2 import (
    CreateSenderRequest,
    DeleteSenderRequest,
    GetSenderRequest,
    ListSendersRequest,
    PauseSenderRequest,
    ResumeSenderRequest,
    UpdateSenderRequest,
)
from redis.asyncio import Redis

from outbox_server.cli.options import to_duration
from outbox_server.deploy.certificates import self_signed
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.queue.connection import connect, open_queues
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.secrets import SecretBox, generate_key
from tests.conftest import Stores
from tests.eventually import eventually
from tests.for_each import for_each_case
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler, stored

KEY = generate_key()
HOURLY_LIMIT = sender_pb2.BINDING_LIMIT_HOURLY_LIMIT
MIN_GAP = sender_pb2.BINDING_LIMIT_MIN_GAP


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, encryption_keys=KEY) as running:
        yield running


def endpoint(**fields: Any) -> sender_pb2.SmtpEndpoint:
    return sender_pb2.SmtpEndpoint(**{"host": "mail.example.com", **fields})


async def test_the_limits_in_effect_name_the_rule_that_sets_each(
    database_url: str, redis_url: str
) -> None:
    settings = {"user_hourly_limit": "500", "user_gap": "1s"}
    async with running_scheduler(database_url, redis_url, **settings) as scheduler:

        async def limits_of(sender: sender_pb2.Sender) -> sender_pb2.EffectiveLimits:
            get = GetSenderRequest(sender_id=sender.sender_id)
            return (await scheduler.senders.GetSender(get)).effective_limits

        plain = await limits_of(await scheduler.sender())
        assert (plain.hourly_limit, plain.hourly_limit_source) == (
            200,
            sender_pb2.LIMIT_SOURCE_SENDER,
        )
        assert plain.min_gap.ToTimedelta() == timedelta(seconds=2)
        assert plain.min_gap_source == sender_pb2.LIMIT_SOURCE_OPERATOR_FLOOR
        assert (plain.max_in_flight, plain.max_in_flight_source) == (
            1,
            sender_pb2.LIMIT_SOURCE_MIN_GAP,
        )
        assert plain.complete
        assert not plain.HasField("cooldown_end_time")

        gap = to_duration(timedelta(seconds=5))
        fast = await scheduler.sender(hourly_limit=900, min_gap=gap, max_in_flight=1)
        found = await limits_of(fast)
        assert (found.hourly_limit, found.hourly_limit_source) == (
            500,
            sender_pb2.LIMIT_SOURCE_OPERATOR,
        )
        assert (found.min_gap, found.min_gap_source) == (gap, sender_pb2.LIMIT_SOURCE_SENDER)
        assert found.max_in_flight_source == sender_pb2.LIMIT_SOURCE_SENDER

        scheduler.execute(
            "INSERT INTO users (user_id, hourly_limit, min_gap_ms) VALUES ('ann', 100, 9000)"
        )
        scheduler.execute(
            "INSERT INTO cooldowns (sender_id, since, next_probe_at, message, smtp_code)"
            " VALUES (%s, now(), now() + interval '5 min', 'Quota', 550)",
            int(fast.sender_id),
        )
        found = await limits_of(fast)
        assert (found.hourly_limit, found.hourly_limit_source) == (
            100,
            sender_pb2.LIMIT_SOURCE_USER,
        )
        assert found.min_gap.ToTimedelta() == timedelta(seconds=9)
        assert found.min_gap_source == sender_pb2.LIMIT_SOURCE_USER
        assert found.max_in_flight_source == sender_pb2.LIMIT_SOURCE_COOLDOWN
        assert found.cooldown_cause == "550 Quota"
        assert found.HasField("cooldown_end_time")


async def test_a_new_sender_has_the_operators_defaults(scheduler: Scheduler) -> None:
    sender = await scheduler.sender(email="Ann@EXAMPLE.com")
    assert sender.user_id == "ann"
    assert sender.email == "Ann@example.com"
    assert sender.state == sender_pb2.SENDER_STATE_ACTIVE
    assert (sender.hourly_limit, sender.max_in_flight) == (200, 5)
    assert not sender.HasField("min_gap")
    assert not sender.HasField("smtp")
    assert sender.effective_min_gap.ToTimedelta() == timedelta(seconds=2)
    assert (sender.effective_hourly_limit, sender.binding_limit) == (200, HOURLY_LIMIT)
    assert sender.create_time == sender.update_time
    get = GetSenderRequest(sender_id=sender.sender_id)
    assert stored(await scheduler.senders.GetSender(get)) == sender


@for_each_case(
    "limit effective binding",
    [(1_799, 1_799, HOURLY_LIMIT), (1_800, 1_800, HOURLY_LIMIT), (5_000, 1_800, MIN_GAP)],
)
async def test_the_answer_says_which_limit_binds(
    scheduler: Scheduler, limit: int, effective: int, binding: int
) -> None:
    sender = await scheduler.sender(hourly_limit=limit)
    assert sender.hourly_limit == limit
    assert (sender.effective_hourly_limit, sender.binding_limit) == (effective, binding)


async def test_a_gap_is_rounded_up_to_whole_milliseconds(scheduler: Scheduler) -> None:
    sender = await scheduler.sender(min_gap=Duration(seconds=2, nanos=1))
    assert sender.min_gap.ToMilliseconds() == 2_001


@for_each_case(
    "fields where reason",
    [
        ({"email": ""}, "email", "ADDRESS_INVALID"),
        ({"email": "news"}, "email", "ADDRESS_INVALID"),
        ({"email": "a@b.org, c@d.org"}, "email", "ADDRESS_INVALID"),
        ({"email": "a@b.org\r\nBcc: c@d.org"}, "email", "ADDRESS_INVALID"),
        ({"display_name": "Ann\nBcc: c@d.org"}, "display_name", "DISPLAY_NAME_INVALID"),
        ({"display_name": "A\0"}, "display_name", "DISPLAY_NAME_INVALID"),
        ({"display_name": "A" * 201}, "display_name", "DISPLAY_NAME_INVALID"),
        ({"hourly_limit": 0}, "hourly_limit", "HOURLY_LIMIT_INVALID"),
        ({"hourly_limit": -1}, "hourly_limit", "HOURLY_LIMIT_INVALID"),
        ({"hourly_limit": 1_000_001}, "hourly_limit", "HOURLY_LIMIT_INVALID"),
        ({"max_in_flight": 0}, "max_in_flight", "MAX_IN_FLIGHT_INVALID"),
        ({"max_in_flight": 1_001}, "max_in_flight", "MAX_IN_FLIGHT_INVALID"),
        ({"min_gap": Duration(seconds=1, nanos=999_000_000)}, "min_gap", "GAP_BELOW_FLOOR"),
        ({"min_gap": Duration(seconds=-5)}, "min_gap", "GAP_BELOW_FLOOR"),
        ({"min_gap": Duration(seconds=86_401)}, "min_gap", "MIN_GAP_INVALID"),
        ({"min_gap": Duration(seconds=5, nanos=-1)}, "min_gap", "INVALID_INPUT"),
        ({"smtp": endpoint(host="")}, "smtp.host", "SMTP_ENDPOINT_INVALID"),
        ({"smtp": endpoint(host="mail:25")}, "smtp.host", "SMTP_ENDPOINT_INVALID"),
        ({"smtp": endpoint(host="a b")}, "smtp.host", "SMTP_ENDPOINT_INVALID"),
        ({"smtp": endpoint(port=65_536)}, "smtp.port", "SMTP_ENDPOINT_INVALID"),
        ({"smtp": endpoint(port=-1)}, "smtp.port", "SMTP_ENDPOINT_INVALID"),
        ({"smtp": endpoint(security=9)}, "smtp.security", "SMTP_ENDPOINT_INVALID"),
        ({"smtp": endpoint(password="p")}, "smtp.username", "SMTP_ENDPOINT_INVALID"),
        (
            {"smtp": endpoint(username="u", password="p", security=1)},
            "smtp.security",
            "SMTP_ENDPOINT_INVALID",
        ),
        (
            {"sending_hours": sender_pb2.SendingHours(start="09:00", end="17:00")},
            "sending_hours.time_zone",
            "UNKNOWN_TIME_ZONE",
        ),
    ],
)
async def test_an_invalid_field_is_named_and_nothing_is_stored(
    scheduler: Scheduler, fields: dict[str, Any], where: str, reason: str
) -> None:
    refusal = await refusal_of(scheduler.sender(**fields))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", reason)
    assert list(refusal.violations) == [f"sender.{where}"]
    assert scheduler.value("SELECT count(*) FROM senders") == 0


async def test_the_error_for_a_gap_below_the_floor_names_both(scheduler: Scheduler) -> None:
    refusal = await refusal_of(scheduler.sender(min_gap=Duration(nanos=500_000_000)))
    assert refusal.metadata == {"min_gap": "500ms", "floor": "2s"}
    assert "500ms" in refusal.message
    assert "2s" in refusal.message


@for_each_case(
    "user_id reason",
    [("", "USER_ID_REQUIRED"), ("a" * 129, "USER_ID_INVALID"), ("a\0b", "USER_ID_INVALID")],
)
async def test_a_sender_needs_a_user(scheduler: Scheduler, user_id: str, reason: str) -> None:
    refusal = await refusal_of(scheduler.sender(user_id))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", reason)


@for_each_case(
    "fields port security",
    [
        ({}, 587, sender_pb2.SMTP_SECURITY_STARTTLS),
        ({"port": 465}, 465, sender_pb2.SMTP_SECURITY_TLS),
        ({"port": 25}, 25, sender_pb2.SMTP_SECURITY_STARTTLS),
        ({"security": 3}, 465, sender_pb2.SMTP_SECURITY_TLS),
        ({"security": 1}, 587, sender_pb2.SMTP_SECURITY_NONE),
        ({"host": "::1"}, 587, sender_pb2.SMTP_SECURITY_STARTTLS),
    ],
)
async def test_an_endpoint_has_a_default_port_and_security(
    scheduler: Scheduler, fields: dict[str, Any], port: int, security: int
) -> None:
    sender = await scheduler.sender(smtp=endpoint(**fields))
    assert (sender.smtp.port, sender.smtp.security) == (port, security)


async def test_a_password_is_stored_encrypted_and_never_returned(scheduler: Scheduler) -> None:
    sender = await scheduler.sender(smtp=endpoint(username="ann", password="open sesame"))
    assert sender.smtp.password_set
    assert "open sesame" not in str(sender)
    stored = scheduler.value("SELECT smtp_password FROM senders")
    assert b"open sesame" not in stored
    assert SecretBox([KEY]).decrypt(stored) == "open sesame"


async def test_a_password_without_an_encryption_key_is_refused(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url, encryption_keys="") as scheduler:
        smtp = endpoint(username="ann", password="open sesame")
        refusal = await refusal_of(scheduler.sender(smtp=smtp))
        assert refusal.reason == "ENCRYPTION_NOT_CONFIGURED"
        assert scheduler.value("SELECT count(*) FROM senders") == 0


async def update(
    scheduler: Scheduler, sender: sender_pb2.Sender, mask: list[str] | None, **fields: Any
) -> sender_pb2.Sender:
    return await scheduler.senders.UpdateSender(
        UpdateSenderRequest(
            sender=sender_pb2.Sender(sender_id=sender.sender_id, **fields),
            update_mask=None if mask is None else FieldMask(paths=mask),
        )
    )


async def test_an_update_changes_the_fields_in_its_mask(scheduler: Scheduler) -> None:
    sender = await scheduler.sender(hourly_limit=7, display_name="Ann", min_gap=Duration(seconds=9))
    changed = await update(
        scheduler, sender, ["hourly_limit", "min_gap"], email="other@example.com", hourly_limit=8
    )
    # A field that is in the mask but unset returns to its default.
    assert (changed.hourly_limit, changed.HasField("min_gap")) == (8, False)
    assert (changed.email, changed.display_name) == (sender.email, "Ann")
    assert changed.update_time.ToNanoseconds() > sender.update_time.ToNanoseconds()
    assert scheduler.value("SELECT revision FROM senders") > 1


async def test_an_update_without_a_mask_changes_the_fields_that_are_set(
    scheduler: Scheduler,
) -> None:
    sender = await scheduler.sender(hourly_limit=7, display_name="Ann")
    changed = await update(scheduler, sender, None, display_name="Bea")
    assert (changed.display_name, changed.hourly_limit, changed.email) == ("Bea", 7, sender.email)


async def test_an_update_with_the_mask_star_resets_unset_fields(scheduler: Scheduler) -> None:
    sender = await scheduler.sender(hourly_limit=7, display_name="Ann", smtp=endpoint())
    changed = await update(scheduler, sender, ["*"], email="other@example.com")
    assert (changed.email, changed.display_name) == ("other@example.com", "")
    assert (changed.hourly_limit, changed.HasField("smtp")) == (200, False)


async def test_a_mask_with_an_unknown_path_is_refused(scheduler: Scheduler) -> None:
    sender = await scheduler.sender()
    for path in ("state", "user_id", "smtp.host", "nonsense", ""):
        mask = ["email", path]
        refusal = await refusal_of(update(scheduler, sender, mask, email="x@example.com"))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "UPDATE_MASK_INVALID"), path
        assert scheduler.value("SELECT revision FROM senders") == 1, path


async def test_an_update_that_is_refused_changes_nothing(scheduler: Scheduler) -> None:
    sender = await scheduler.sender()
    refusal = await refusal_of(
        update(scheduler, sender, None, email="x@example.com", hourly_limit=0)
    )
    assert refusal.reason == "HOURLY_LIMIT_INVALID"
    assert scheduler.rows("SELECT email, revision FROM senders") == [("news@example.com", 1)]


async def test_an_endpoint_is_replaced_as_a_whole(scheduler: Scheduler) -> None:
    sender = await scheduler.sender(smtp=endpoint(username="ann", password="open sesame"))
    changed = await update(
        scheduler, sender, ["smtp"], smtp=endpoint(host="evil.example.com", username="ann")
    )
    assert (changed.smtp.host, changed.smtp.password_set) == ("evil.example.com", False)
    assert scheduler.value("SELECT smtp_password FROM senders") is None


async def test_an_endpoint_may_have_its_own_ca_certificates(
    scheduler: Scheduler, tmp_path: Path
) -> None:
    ca = self_signed(tmp_path).public.read_text()
    sender = await scheduler.sender(smtp=endpoint(ca_certificates=ca))
    assert sender.smtp.ca_certificates == ca
    request = GetSenderRequest(sender_id=sender.sender_id)
    assert (await scheduler.senders.GetSender(request)).smtp.ca_certificates == ca
    # A page of a thousand senders with 64 KiB each would be too large for an answer.
    listed = await scheduler.senders.ListSenders(ListSendersRequest(user_id="ann"))
    assert listed.senders[0].smtp.ca_certificates == ""

    changed = await update(scheduler, sender, ["smtp"], smtp=endpoint())
    assert changed.smtp.ca_certificates == ""
    assert scheduler.value("SELECT smtp_ca FROM senders") is None
    await update(scheduler, sender, ["smtp"], smtp=endpoint(ca_certificates=ca))
    await update(scheduler, sender, ["smtp"])
    assert scheduler.value("SELECT smtp_ca FROM senders") is None


async def test_certificates_that_cannot_be_used_are_refused(
    scheduler: Scheduler, tmp_path: Path
) -> None:
    broken = "-----BEGIN CERTIFICATE-----\nAAAA\n"
    with_nul = self_signed(tmp_path).public.read_text() + "\x00"
    for ca in ("hello", broken, "x" * 65_537, "ü", with_nul):
        refusal = await refusal_of(scheduler.sender(smtp=endpoint(ca_certificates=ca)))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "SMTP_ENDPOINT_INVALID"), ca
        assert list(refusal.violations) == ["sender.smtp.ca_certificates"], ca
        assert scheduler.rows("SELECT id FROM senders") == [], ca


@pytest_asyncio.fixture
async def queue(scheduler: Scheduler, redis: Redis) -> AsyncIterator[Queue]:
    """The queue of a dispatcher, with a complete shard."""
    del redis
    engine, client = create_engine(scheduler.settings), connect(scheduler.settings)
    (only,) = open_queues(client, scheduler.settings)
    assert await HeadLoader(engine, [only], scheduler.settings).rebuild(only)
    yield only
    await client.aclose()
    await engine.dispose()


async def test_a_resumed_sender_continues_where_it_stopped(
    scheduler: Scheduler, queue: Queue
) -> None:
    sender = await scheduler.sender()
    await scheduler.schedule(sender, "email\na@b.org\nb@b.org\n")
    pause = PauseSenderRequest(sender_id=sender.sender_id)
    paused = await scheduler.senders.PauseSender(pause)
    assert paused.state == sender_pb2.SENDER_STATE_PAUSED
    assert (await queue.claim(10)).claims == ()
    revision = scheduler.value("SELECT revision FROM senders")
    assert await scheduler.senders.PauseSender(pause) == paused  # idempotent
    assert scheduler.value("SELECT revision FROM senders") == revision
    resume = ResumeSenderRequest(sender_id=sender.sender_id)
    resumed = await scheduler.senders.ResumeSender(resume)
    assert resumed.state == sender_pb2.SENDER_STATE_ACTIVE
    assert len((await queue.claim(10)).claims) == 1
    assert scheduler.value("SELECT revision FROM senders") > revision > 1
    await eventually(lambda: scheduler.value("SELECT count(*) = 0 FROM head_markers"))


async def test_a_change_while_redis_is_unreachable_is_loaded_later(
    scheduler: Scheduler, stores: Stores
) -> None:
    sender = await scheduler.sender()
    await stores.redis.stop()
    try:
        pause = PauseSenderRequest(sender_id=sender.sender_id)
        paused = await scheduler.senders.PauseSender(pause)
    finally:
        await stores.redis.start()
    assert paused.state == sender_pb2.SENDER_STATE_PAUSED
    # The marker makes a dispatcher load it.
    assert scheduler.rows("SELECT sender_id FROM head_markers") == [(int(sender.sender_id),)]


async def test_a_sender_of_another_user_is_not_found(scheduler: Scheduler) -> None:
    sender = await scheduler.sender("ann")
    foreign, unknown = sender.sender_id, "999999999"
    calls = (
        lambda one: scheduler.senders.GetSender(GetSenderRequest(sender_id=one, user_id="bob")),
        lambda one: scheduler.senders.UpdateSender(
            UpdateSenderRequest(
                sender=sender_pb2.Sender(sender_id=one, display_name="Bob"), user_id="bob"
            )
        ),
        lambda one: scheduler.senders.PauseSender(PauseSenderRequest(sender_id=one, user_id="bob")),
        lambda one: scheduler.senders.ResumeSender(
            ResumeSenderRequest(sender_id=one, user_id="bob")
        ),
        lambda one: scheduler.senders.DeleteSender(
            DeleteSenderRequest(sender_id=one, user_id="bob", force=True)
        ),
    )
    for call in calls:
        refusal = await refusal_of(call(foreign))
        assert (refusal.code, refusal.reason) == ("NOT_FOUND", "SENDER_NOT_FOUND")
        other = await refusal_of(call(unknown))
        assert refusal.message.replace(foreign, "") == other.message.replace(unknown, "")
    assert scheduler.rows("SELECT revision, deleted_at FROM senders") == [(1, None)]


@for_each_case(
    "text",
    [("x",), ("-1",), ("0",), ("1.5",), ("9" * 30,), ("\u0661",)],
)
async def test_a_malformed_sender_id_is_not_found(scheduler: Scheduler, text: str) -> None:
    refusal = await refusal_of(scheduler.senders.GetSender(GetSenderRequest(sender_id=text)))
    assert (refusal.code, refusal.reason) == ("NOT_FOUND", "SENDER_NOT_FOUND")


async def test_senders_are_listed_in_pages_oldest_first(scheduler: Scheduler) -> None:
    mine = [(await scheduler.sender()).sender_id for _ in range(5)]
    await scheduler.sender("bob")
    seen: list[str] = []
    token, pages = "", 0
    while token or not pages:
        page = await scheduler.senders.ListSenders(
            ListSendersRequest(user_id="ann", page_size=2, page_token=token)
        )
        assert len(page.senders) <= 2
        seen += [sender.sender_id for sender in page.senders]
        token, pages = page.next_page_token, pages + 1
    assert (seen, pages) == (mine, 3)


async def test_a_page_token_of_another_list_is_refused(scheduler: Scheduler) -> None:
    for _ in range(2):
        await scheduler.sender()
    page = await scheduler.senders.ListSenders(ListSendersRequest(user_id="ann", page_size=1))
    for user_id, token in (("bob", page.next_page_token), ("ann", "nonsense")):
        refusal = await refusal_of(
            scheduler.senders.ListSenders(ListSendersRequest(user_id=user_id, page_token=token))
        )
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID")
    refusal = await refusal_of(
        scheduler.senders.ListSenders(ListSendersRequest(user_id="ann", page_size=-1))
    )
    assert refusal.reason == "PAGE_SIZE_INVALID"


async def test_senders_are_listed_by_state(scheduler: Scheduler) -> None:
    first, second = [await scheduler.sender() for _ in range(2)]
    await scheduler.senders.PauseSender(PauseSenderRequest(sender_id=first.sender_id))
    for state, wanted in (
        (sender_pb2.SENDER_STATE_ACTIVE, second),
        (sender_pb2.SENDER_STATE_PAUSED, first),
    ):
        page = await scheduler.senders.ListSenders(ListSendersRequest(user_id="ann", state=state))
        assert [sender.sender_id for sender in page.senders] == [wanted.sender_id]


async def test_a_sender_with_open_jobs_is_not_deleted(scheduler: Scheduler) -> None:
    sender = await scheduler.sender()
    await scheduler.schedule(sender)
    request = DeleteSenderRequest(sender_id=sender.sender_id)
    for state, lease in ((1, None), (2, "now()")):
        scheduler.execute(f"UPDATE email_jobs SET state = {state}, lease_until = {lease or 'NULL'}")
        refusal = await refusal_of(scheduler.senders.DeleteSender(request))
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "SENDER_HAS_OPEN_JOBS")
    assert scheduler.value("SELECT deleted_at FROM senders") is None


async def test_a_forced_deletion_cancels_waiting_jobs_and_keeps_the_history(
    scheduler: Scheduler, queue: Queue
) -> None:
    smtp = endpoint(username="ann", password="open sesame")
    sender = await scheduler.sender(smtp=smtp)
    answer = await scheduler.schedule(sender, "email\na@b.org\nb@b.org\n", request_id="once")
    request = DeleteSenderRequest(sender_id=sender.sender_id, force=True)
    await scheduler.senders.DeleteSender(request)
    assert (await queue.claim(10)).claims == ()
    assert scheduler.value("SELECT smtp_password FROM senders") is None
    # The rows follow a moment later; until then every reader sees the jobs as CANCELLED.
    rows = "SELECT state, finished_at IS NOT NULL FROM email_jobs"
    await eventually(lambda: scheduler.rows(rows) == [(6, True)] * 2)
    counted = scheduler.rows("SELECT state, sum(n) FROM count_deltas GROUP BY 1 ORDER BY 1")
    assert counted == [(1, 0), (6, 2)]
    for call in (
        scheduler.senders.DeleteSender(request),
        scheduler.senders.GetSender(GetSenderRequest(sender_id=sender.sender_id)),
        scheduler.schedule(sender),
    ):
        assert (await refusal_of(call)).reason == "SENDER_NOT_FOUND"
    listed = await scheduler.senders.ListSenders(ListSendersRequest(user_id="ann"))
    assert list(listed.senders) == []
    jobs = await scheduler.jobs.ListEmailJobs(
        email_job_service_pb2.ListEmailJobsRequest(batch_id=answer.batch.batch_id)
    )
    assert len(jobs.email_jobs) == 2
    again = await scheduler.schedule(sender, "email\na@b.org\nb@b.org\n", request_id="once")
    assert again.replayed


async def test_a_create_without_a_sender_is_refused(scheduler: Scheduler) -> None:
    refusal = await refusal_of(scheduler.senders.CreateSender(CreateSenderRequest(user_id="ann")))
    assert refusal.reason == "ADDRESS_INVALID"


async def test_sending_hours_are_stored_changed_and_removed(scheduler: Scheduler) -> None:
    def hours(start: str, end: str, zone: str = "Europe/Berlin") -> sender_pb2.SendingHours:
        days = [sender_pb2.WEEKDAY_MONDAY, sender_pb2.WEEKDAY_FRIDAY]
        return sender_pb2.SendingHours(weekdays=days, start=start, end=end, time_zone=zone)

    night = hours("22:30", "24:00")
    sender = await scheduler.sender(sending_hours=night)
    assert sender.sending_hours == night
    for wrong, reason in (
        (hours("9:00", "17:00"), "SENDING_HOURS_INVALID"),
        (hours("09:00", "24:01"), "SENDING_HOURS_INVALID"),
        (hours("24:00", "06:00"), "SENDING_HOURS_INVALID"),
        (hours("09:00", "09:00"), "SENDING_HOURS_INVALID"),
        (hours("09:00", "17:00", "Mars/Olympus"), "UNKNOWN_TIME_ZONE"),
    ):
        refusal = await refusal_of(scheduler.sender(sending_hours=wrong))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", reason)
    request = UpdateSenderRequest(
        sender=sender_pb2.Sender(sender_id=sender.sender_id, sending_hours=hours("22:00", "06:00"))
    )
    assert (await scheduler.senders.UpdateSender(request)).sending_hours == hours("22:00", "06:00")
    request.sender.ClearField("sending_hours")
    request.update_mask.paths.append("sending_hours")
    assert not (await scheduler.senders.UpdateSender(request)).HasField("sending_hours")
