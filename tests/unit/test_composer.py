"""How a mail is composed and routed; the reader of batches is injected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import pytest_asyncio

from outbox_server.services.dispatcher import composer as composer_module
from outbox_server.services.dispatcher import prepared as prepared_module
from outbox_server.services.dispatcher.composer import Composer, CompositionError, ReadBatches
from outbox_server.services.dispatcher.smtp import Envelope
from outbox_server.services.dispatcher.storage import MarkedJob, UpcomingBatch
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.mail.content import BatchContent
from outbox_server.shared.queue.circuit_keys import CircuitKeys
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.secrets import SecretBox, generate_key
from outbox_server.shared.settings import load_settings
from outbox_server.shared.smtp.endpoint import Endpoint, StoredEndpoint, relay_of
from outbox_server.shared.states import SmtpSecurity
from outbox_server.shared.templates.workers import WorkerPool
from tests.eventually import eventually

BATCH = BatchContent(
    batch_id=1,
    user_id="anna",
    subject="Hello {{ name }}",
    body="Dear {{ name }}",
    html=None,
    variable_names=("name",),
    sender_revision=1,
    message_id_address="shop@shop.test",
    email="shop@shop.test",
    display_name="",
    endpoint=StoredEndpoint("anna"),
)
SMALL = UpcomingBatch("anna", 100)
RELAY = Endpoint("relay.test", 25, SmtpSecurity.NONE, operators=True)


def job(number: int = 1, *, batch: int = 1, revision: int = 1, **changes: Any) -> MarkedJob:
    marked = MarkedJob(
        job=JobRef(number, 1),
        sender_id=7,
        batch_id=batch,
        failures=0,
        recipient="ann@x.test",
        variables='["Ann"]',
        lease_until=datetime(2026, 11, 24, tzinfo=UTC),
        sender_revision=revision,
    )
    return replace(marked, **changes)


POOLS: list[WorkerPool] = []


@pytest_asyncio.fixture(autouse=True)
async def workers_end() -> AsyncIterator[None]:
    yield
    while POOLS:
        await POOLS.pop().close()


class Reader:
    """The batches in PostgreSQL, and the requests for them."""

    def __init__(self, *batches: BatchContent) -> None:
        self.batches = {batch.batch_id: batch for batch in batches}
        self.asked: list[list[int]] = []

    async def __call__(self, batch_ids: Sequence[int]) -> dict[int, BatchContent]:
        self.asked.append(list(batch_ids))
        return {
            batch_id: self.batches[batch_id] for batch_id in batch_ids if batch_id in self.batches
        }


async def _inst() -> str:
    return "inst"


async def compose(composer: Composer, job: MarkedJob) -> tuple[Endpoint, Envelope]:
    return await composer.compose(job, wait=60)


def composer_of(reader: ReadBatches, secrets: SecretBox | None = None, **settings: Any) -> Composer:
    settings = {"smtp_url": "smtp://relay.test"} | settings
    loaded = load_settings(**settings)
    workers = WorkerPool("outbox_server.shared.mail.worker", loaded)
    POOLS.append(workers)
    return Composer(loaded, secrets or SecretBox(), reader, _inst, workers)


async def test_a_mail_has_its_row_its_addresses_and_a_unique_message_id() -> None:
    composer = composer_of(Reader(BATCH))
    await composer.prepare([job(41)])

    endpoint, envelope = await compose(composer, job(41))

    assert endpoint == RELAY
    assert (envelope.mail_from, envelope.rcpt_to) == ("shop@shop.test", "ann@x.test")
    assert not envelope.needs_smtputf8
    assert b"\r\nSubject: Hello Ann\r\n" in envelope.data
    assert b"\r\nMessage-ID: <outbox.41.inst@shop.test>\r\n" in envelope.data
    assert envelope.data.endswith(b"\r\n\r\nDear Ann\r\n")


async def test_the_message_id_is_the_same_for_every_attempt() -> None:
    composer = composer_of(Reader(BATCH))
    await composer.prepare([job(41)])

    mails = [(await compose(composer, job(41, job=JobRef(41, n))))[1].data for n in (1, 2, 3)]

    assert all(b"<outbox.41.inst@shop.test>" in mail for mail in mails)


async def test_a_batch_is_read_once_until_its_sender_changes() -> None:
    reader = Reader(BATCH)
    composer = composer_of(reader)
    for number in range(3):
        await composer.prepare([job(number), job(number + 10)])
    assert reader.asked == [[1]]

    reader.batches[1] = replace(BATCH, sender_revision=2, email="new@shop.test")
    await composer.prepare([job(4, revision=2)])
    await composer.prepare([job(5, revision=2), job(6, revision=1)])

    assert reader.asked == [[1], [1]]
    assert (await compose(composer, job(4, revision=2)))[1].mail_from == "new@shop.test"


async def test_what_was_prepared_ahead_is_used_and_read_again_if_it_has_changed() -> None:
    reader = Reader(BATCH, replace(BATCH, batch_id=2))
    composer = composer_of(reader)
    await composer.prepare_ahead({1: SMALL, 2: SMALL, 3: SMALL})
    await composer.prepare_ahead({1: SMALL, 2: SMALL})
    assert reader.asked == [[1, 2, 3]]
    await composer.prepare([job(1)])
    assert len(reader.asked) == 1

    reader.batches[2] = replace(BATCH, batch_id=2, batch_revision=2, subject="New")
    await composer.prepare([job(2, batch=2, batch_revision=2)])

    assert reader.asked == [[1, 2, 3], [2]]
    _, envelope = await compose(composer, job(2, batch=2, batch_revision=2))
    assert b"\r\nSubject: New\r\n" in envelope.data


async def test_only_what_was_prepared_ahead_and_not_used_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepared_module, "_KEPT_S", 0.0)
    gate, reading = asyncio.Event(), asyncio.Event()

    async def read(batch_ids: Sequence[int]) -> dict[int, BatchContent]:
        if 2 in batch_ids and not reading.is_set():
            reading.set()
            await gate.wait()
        return {n: replace(BATCH, batch_id=n) for n in batch_ids}

    composer = composer_of(read)
    # The second batch is prepared ahead while a claim reads it.
    claimed = asyncio.create_task(composer.prepare([job(1), job(2, batch=2)]))
    await reading.wait()
    await composer.prepare_ahead({2: SMALL, 3: SMALL})
    gate.set()
    await claimed
    await composer.prepare_ahead({})

    assert sorted(composer._batches) == [1, 2]
    await compose(composer, job(2, batch=2))


async def test_the_workers_start_before_mail_that_needs_them_is_due() -> None:
    composer = composer_of(Reader(replace(BATCH, body="{{ name | upcase }}")))
    await composer.prepare_ahead({1: SMALL})
    await eventually(lambda: all(slot.is_ready for slot in POOLS[-1]._slots))


async def test_a_late_read_does_not_restore_old_sender_data() -> None:
    gate, reading = asyncio.Event(), asyncio.Event()
    newer = Reader(replace(BATCH, sender_revision=2, email="new@shop.test"))

    async def read(batch_ids: Sequence[int]) -> dict[int, BatchContent]:
        if not reading.is_set():
            reading.set()
            await gate.wait()
            return {1: BATCH}
        return await newer(batch_ids)

    composer = composer_of(read)
    late = asyncio.create_task(composer.prepare([job(1)]))
    await reading.wait()
    await composer.prepare([job(2, revision=2)])
    gate.set()
    await late

    for each in (job(1), job(2, revision=2)):
        assert (await compose(composer, each))[1].mail_from == "new@shop.test"


async def test_a_change_of_a_sender_that_a_failover_has_lost_is_not_used() -> None:
    reader = Reader(replace(BATCH, sender_revision=2, email="lost@shop.test"))
    composer = composer_of(reader)
    await composer.prepare([job(1, revision=2)])

    reader.batches[1] = BATCH
    await composer.prepare([job(2, revision=1)])

    assert (await compose(composer, job(2, revision=1)))[1].mail_from == "shop@shop.test"


async def test_the_batches_of_one_group_are_read_together() -> None:
    reader = Reader(BATCH, replace(BATCH, batch_id=2, body="Two"))
    composer = composer_of(reader)

    await composer.prepare([job(1, batch=2), job(2, batch=1), job(3, batch=2)])

    assert reader.asked == [[1, 2]]
    assert (await compose(composer, job(1, batch=2)))[1].data.endswith(b"Two\r\n")


def keep_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make room for four batches, unless the concurrency needs more."""
    size = composer_module._LEAST_OF_A_BATCH
    monkeypatch.setattr(composer_module, "_KEPT_CHARACTERS", 4 * size)
    monkeypatch.setattr(composer_module, "_MOST_OF_A_BATCH", size)
    monkeypatch.setattr(composer_module, "MOST_PREPARED", 0)


async def test_no_batch_of_a_group_is_evicted_before_its_mails_are_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep_few(monkeypatch)
    composer = composer_of(
        Reader(*(replace(BATCH, batch_id=n) for n in range(1, 20))), dispatcher_concurrency=2
    )
    for n in range(1, 5):
        await composer.prepare([job(n, batch=n)])

    # Batch 1 is cached and is the oldest; 5 is new: there is room for both.
    group = [job(1, batch=1), job(5, batch=5)]
    await composer.prepare(group)

    for each in group:
        await compose(composer, each)


async def test_a_batch_is_not_evicted_while_another_batch_of_its_group_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep_few(monkeypatch)
    reader = Reader(*(replace(BATCH, batch_id=n) for n in range(1, 20)))
    resume = asyncio.Event()

    async def read(batch_ids: Sequence[int]) -> dict[int, BatchContent]:
        if batch_ids == [5]:
            await resume.wait()
        return await reader(batch_ids)

    composer = composer_of(read, dispatcher_concurrency=4)
    for n in range(1, 5):
        await composer.prepare([job(n, batch=n)])

    # Batch 1 is the oldest. While 5 is read, another group adds one more.
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(composer.prepare([job(1, batch=1), job(5, batch=5)]))
        await asyncio.sleep(0)
        await composer.prepare([job(6, batch=6)])
        resume.set()

    for n in (1, 5, 6):
        await compose(composer, job(n, batch=n))


async def test_a_group_with_more_batches_than_the_cache_holds_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep_few(monkeypatch)
    group = [job(n, batch=n) for n in range(1, 11)]
    composer = composer_of(
        Reader(*(replace(BATCH, batch_id=n) for n in range(1, 20))), dispatcher_concurrency=10
    )

    await composer.prepare(group)

    for each in group:
        await compose(composer, each)


async def test_the_number_of_cached_batches_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_few(monkeypatch)
    reader = Reader(*(replace(BATCH, batch_id=n) for n in range(1, 40)))
    composer = composer_of(reader, dispatcher_concurrency=2)
    for n in range(1, 40):
        await composer.prepare([job(n, batch=n)])

    assert len(composer._batches) == 4
    # An evicted batch is read again.
    await composer.prepare([job(1, batch=1)])
    assert reader.asked[-1] == [1]
    await compose(composer, job(1, batch=1))


async def test_the_size_of_cached_batches_is_bounded() -> None:
    large = replace(BATCH, body="x" * 250_000, html="y" * 250_000)
    reader = Reader(*(replace(large, batch_id=n) for n in range(1, 300)))
    composer = composer_of(reader, dispatcher_concurrency=2)
    for n in range(1, 300):
        await composer.prepare([job(n, batch=n)])

    assert len(composer._batches) == 64 * 1024 * 1024 // (500_000 + 16 * 1024 + 20)


async def test_mails_are_built_one_in_each_turn_of_the_event_loop() -> None:
    composer = composer_of(Reader(BATCH))
    await composer.prepare([job(1)])
    built: list[int] = []
    tasks = [asyncio.create_task(compose(composer, job(n))) for n in range(1, 11)]
    while not all(each.done() for each in tasks):
        before = sum(each.done() for each in tasks)
        await asyncio.sleep(0)
        built.append(sum(each.done() for each in tasks) - before)

    assert max(built) == 1
    await asyncio.gather(*tasks)


async def test_a_row_that_cannot_become_a_mail_has_a_reason() -> None:
    # One mail has the row's own subject.
    composer = composer_of(Reader(replace(BATCH, subject=None, variable_names=("subject", "name"))))
    await composer.prepare([job()])

    with pytest.raises(CompositionError, match=r"^SUBJECT_LINE_BREAK: "):
        await compose(composer, job(variables='["a\\nBcc: all@x.test","Ann"]'))
    with pytest.raises(CompositionError, match=r"^ADDRESS_INVALID: "):
        await compose(
            composer, job(recipient="a@x.test>\r\nRCPT TO:<b@x.test", variables='["s","n"]')
        )
    assert await compose(composer, job(variables='["Fine","Ann"]'))


async def test_a_mail_over_the_size_limit_names_its_size_and_the_limit() -> None:
    reader = Reader(replace(BATCH, subject="s", body="{{ name }}" * 20))
    composer = composer_of(reader, max_message_bytes=10_000)
    await composer.prepare([job()])

    # Refused while it is rendered, and before and after it is encoded.
    for name, size in (
        ("x" * 900, r"at least 18,\d{3}"),
        ("x" * 475 + "\\u0001" * 9, r"at least 10,\d{3}"),
        ("x" * 480, r"10,\d{3}"),
    ):
        with pytest.raises(
            CompositionError,
            match=rf"^MESSAGE_TOO_LARGE: the mail has {size} bytes, .*_BYTES permits 10,000$",
        ):
            await compose(composer, job(variables=f'["{name}"]'))
    assert await compose(composer, job(variables='["Ann"]'))


async def test_a_sender_whose_name_is_too_large_for_any_mail_is_reported() -> None:
    reader = Reader(replace(BATCH, display_name="名" * 1_000))
    composer = composer_of(reader, max_message_bytes=2_000)
    await composer.prepare([job()])

    with pytest.raises(CompositionError, match=r"^MESSAGE_TOO_LARGE: the mail has at least "):
        await compose(composer, job())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"body": "{% if %}"}, "body"),
        ({"email": "no address"}, "not a mail address"),
        (
            {"endpoint": StoredEndpoint("anna", "own.test", 25, password=b"token")},
            "OUTBOX_ENCRYPTION_KEYS",
        ),
    ],
)
async def test_a_batch_that_cannot_be_built_fails_its_mails_and_no_others(
    change: dict[str, Any], text: str
) -> None:
    composer = composer_of(Reader(replace(BATCH, **change), replace(BATCH, batch_id=2)))
    await composer.prepare([job(1), job(2, batch=2)])

    with pytest.raises(CompositionError, match=text):
        await compose(composer, job(1))
    await compose(composer, job(2, batch=2))


async def test_a_batch_that_the_cache_has_forgotten_fails_no_mail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(composer_module, "_KEPT_CHARACTERS", 0)
    monkeypatch.setattr(composer_module, "MOST_PREPARED", 0)
    monkeypatch.setattr(composer_module, "_MOST_OF_A_BATCH", 4096)
    monkeypatch.setattr(composer_module, "_LEAST_OF_A_BATCH", 4096)
    reader = Reader(*(replace(BATCH, batch_id=n) for n in range(1, 5)))
    composer = composer_of(reader, dispatcher_concurrency=2)
    await composer.prepare([job()])
    # Meanwhile other slots send many mails.
    for n in range(2, 5):
        await composer.prepare([job(n, batch=n)])

    # It is given back, and may be sent later.
    with pytest.raises(TimeoutError):
        await compose(composer, job())
    await composer.prepare([job()])
    await compose(composer, job())
    # One that was deleted, with its jobs.
    await composer.prepare([job(9, batch=9)])
    with pytest.raises(TimeoutError):
        await compose(composer, job(9, batch=9))


OWN = StoredEndpoint("anna", "own.test", 2525, username="anna")


async def test_a_sender_with_its_own_relay_uses_it_with_starttls_by_default() -> None:
    secrets = SecretBox([generate_key()])
    own = replace(OWN, password=secrets.encrypt("s3cret"))
    composer = composer_of(Reader(replace(BATCH, endpoint=own)), secrets)
    await composer.prepare([job()])

    endpoint, _ = await compose(composer, job())

    # As in a head that another process loads.
    circuit = CircuitKeys(secrets, override=False).of_sender(
        "anna",
        "OWN.test",
        2525,
        None,
        "anna",
        password=secrets.encrypt("s3cret"),
        oauth2_credentials_id=None,
    )
    assert endpoint == Endpoint(
        "own.test", 2525, SmtpSecurity.STARTTLS, "anna", "s3cret", circuit=circuit
    )
    assert "s3cret" not in repr(endpoint)


async def test_override_sends_everything_to_the_relay() -> None:
    composer = composer_of(Reader(replace(BATCH, endpoint=OWN)), smtp_override=True)
    await composer.prepare([job()])

    assert (await compose(composer, job()))[0] == RELAY


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("smtp://mail.test", Endpoint("mail.test", 25, SmtpSecurity.NONE)),
        ("smtp://mail.test:1025", Endpoint("mail.test", 1025, SmtpSecurity.NONE)),
        ("smtps://mail.test", Endpoint("mail.test", 465, SmtpSecurity.TLS)),
        ("smtp+starttls://mail.test", Endpoint("mail.test", 587, SmtpSecurity.STARTTLS)),
        ("SMTP://Mail.Test/", Endpoint("mail.test", 25, SmtpSecurity.NONE)),
        ("smtp://[::1]:1025", Endpoint("::1", 1025, SmtpSecurity.NONE)),
        (
            "smtps://anna%40x.test:p%3As%2Fs@mail.test:4650",
            Endpoint("mail.test", 4650, SmtpSecurity.TLS, "anna@x.test", "p:s/s"),
        ),
    ],
)
def test_a_relay_is_read_from_its_url(url: str, endpoint: Endpoint) -> None:
    assert relay_of(url) == replace(endpoint, operators=True)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "mail.test:25",
        "http://mail.test",
        "smtp://",
        "smtp://:25",
        "smtp://mail.test:0x",
        "smtp://mail.test:70000",
        "smtp://[::1",
        "smtp:mail.test",
        "//anna:s3cret@mail.test",
        "anna:s3cret@mail.test",
        "smtp://anna:s3cret@[::1",
        "smtp://anna:s3cret@mail.test:70000",
    ],
)
def test_an_invalid_url_is_reported_by_its_variable_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^OUTBOX_SMTP_URL: .*smtp://host:port") as caught:
        relay_of(url)

    assert "s3cret" not in str(caught.value)


def test_a_relays_password_in_clear_is_refused_unless_allowed() -> None:
    url = "smtp://anna:s3cret@mail.test"
    with pytest.raises(ConfigurationError, match=r"unencrypted.*OUTBOX_PLAINTEXT") as caught:
        relay_of(url)
    assert "s3cret" not in str(caught.value)
    assert relay_of(url, plaintext=True).password == "s3cret"
    assert relay_of("smtp://anna:s3cret@127.0.0.1").password == "s3cret"
    assert relay_of("smtp+starttls://anna:s3cret@mail.test").password == "s3cret"
