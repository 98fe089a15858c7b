"""Runs a service with the stored settings, and runs it again when they have changed.

A change begins a new key space in Redis (see `shared.agreed.values`), and from its commit on
PostgreSQL refuses every mark of the old one. A process that notices the change finishes its mails
in flight, and starts again with the new values. A service that only reads adopts them at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.agreed.storage import read_agreed, read_or_store
from outbox_server.shared.agreed.values import AgreedSettings, AgreedValues
from outbox_server.shared.database.engine import DATABASE_ERRORS, create_engine
from outbox_server.shared.database.schema import SchemaOlderError, read_revision
from outbox_server.shared.errors import ConfigurationError, FailedPrecondition
from outbox_server.shared.loops import Loop
from outbox_server.shared.settings import Settings

# A change is noticed after this time at the latest, while PostgreSQL can be reached.
_LOOK: Final = timedelta(seconds=1)
# The limit of the first look, long enough for a busy machine. A run without settings starts again
# once they are known.
_FIRST_LOOK_S: Final = 10.0
# The key space of a process that could not read the settings yet. Nothing is ever sent from it.
UNKNOWN_KEY_SPACE: Final = "unknown"
_log = structlog.get_logger("outbox.settings")

Work = Callable[[], Awaitable[None]]
Follow = Callable[[Settings, AgreedSettings], None]


class SettingsUnknownError(FailedPrecondition):
    """The stored settings were not read yet: the service waits for PostgreSQL."""

    default_reason = "SETTINGS_UNKNOWN"


class AgreedRun:
    """One run of a service with one state of the stored settings, until `stop` is set.

    `agreed` is None if they could not be read from PostgreSQL. Such a run only waits.
    """

    def __init__(
        self,
        given: Settings,
        agreed: AgreedSettings | None,
        ready: Callable[[int], None] | None = None,
        *,
        reads_only: bool = False,
    ) -> None:
        """`given` has the settings of the environment. `ready` is called with the bound port.

        With `reads_only`, the service stores no values, and adopts changes while it runs.

        Raises:
            ConfigurationError: a setting contradicts the stored ones.
        """
        self._given = given
        self.agreed = agreed
        self.settings = given if agreed is None else agreed.values.apply_to(given)
        self.stop = asyncio.Event()
        # The stored settings as last read, if they differ from `agreed`.
        self.successor: AgreedSettings | None = None
        self.refusal: ConfigurationError | None = None
        # The start of the last look that found nothing changed, by `time.monotonic`.
        self.confirmed_at = time.monotonic()
        self.port = 0
        self._ready = ready
        self._reads_only = reads_only
        self._followers: list[Follow] = []

    @property
    def key_space(self) -> str:
        """The key space of the queues of this run."""
        return UNKNOWN_KEY_SPACE if self.agreed is None else self.agreed.key_space

    def known(self, work: Sequence[Work]) -> Sequence[Work]:
        """Return `work`, or nothing if this run does not know the settings and only waits."""
        return work if self.agreed is not None else ()

    def bound(self, port: int) -> None:
        """Report the port that the server listens on."""
        self.port = port
        if self._ready is not None:
            self._ready(port)

    def follow(self, follower: Follow) -> None:
        """Call `follower` with each later state of the settings, until the run has ended."""
        self._followers.append(follower)

    async def check(self, schema: Callable[[], Awaitable[None]], engine: AsyncEngine) -> None:
        """Check the schema, and look for changed settings. This is a dependency of the health.

        Raises:
            SettingsUnknownError: they were not known until now; this run ends, and the next one
                uses them.
            OutboxError, sqlalchemy.exc.SQLAlchemyError: raised by `schema`.
        """
        await schema()
        await self.look(engine)
        if self.agreed is None:
            raise SettingsUnknownError("the stored settings were not read yet")

    async def look(self, engine: AsyncEngine) -> None:
        """Read the stored settings, and end the run if they have changed."""
        asked = time.monotonic()
        found = await _read(engine, self.settings, reads_only=self._reads_only)
        if found == (self.successor or self.agreed):
            if self.successor is None:
                self.confirmed_at = asked
            return
        try:
            if self.agreed is None:
                found.values.refuse_other(self._given)
            settings = found.values.apply_to(self._given)
        except ConfigurationError as error:
            self.refusal = error
        else:
            if self.agreed is not None:
                _log.warning(
                    "settings_changed",
                    settings=found.values.texts(),
                    contradictions=found.values.differences(self._given),
                )
            for follower in self._followers:
                follower(settings, found)
            if self._reads_only and self.agreed is not None:
                self.agreed, self.settings = found, settings
                return
            self.successor = found
        self.stop.set()

    @asynccontextmanager
    async def looking(self, engine: AsyncEngine) -> AsyncIterator[None]:
        """Look for further changes while the work of this run ends.

        Until then the health check looks for them. It ends with `stop`.
        """

        async def look() -> timedelta:
            await self.look(engine)
            return _LOOK

        async def look_at_the_end() -> None:
            await self.stop.wait()
            await Loop("settings", look, errors=DATABASE_ERRORS).run()

        task = asyncio.create_task(look_at_the_end())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})


async def run_agreed(
    given: Settings,
    stop: asyncio.Event,
    serve: Callable[[AgreedRun], Awaitable[None]],
    *,
    listen: str,
    ready: Callable[[int], None] | None = None,
    reads_only: bool = False,
) -> None:
    """Run `serve` with the stored settings until `stop` is set, once for each state of them.

    `given` has the settings of the environment; an empty installation stores them. `listen` is the
    name of the setting with the server's address. `ready` is called with the port of the first run,
    which the later ones keep. `AgreedRun` explains `reads_only`.

    Raises:
        ConfigurationError: the environment contradicts the stored settings.
    """
    agreed = await _first_look(given, stop, reads_only=reads_only)
    while True:
        run = AgreedRun(given, agreed, ready, reads_only=reads_only)
        await _run_until(stop, run, serve)
        if run.refusal is not None:
            raise run.refusal
        if stop.is_set() or run.successor is None:
            return
        agreed, ready = run.successor, None
        host, _, port = str(getattr(given, listen)).rpartition(":")
        if port == "0" and run.port:
            given = given.model_copy(update={listen: f"{host}:{run.port}"})


async def _run_until(
    stop: asyncio.Event, run: AgreedRun, serve: Callable[[AgreedRun], Awaitable[None]]
) -> None:
    async def stop_run() -> None:
        await stop.wait()
        run.stop.set()

    stopping = asyncio.create_task(stop_run())
    try:
        await serve(run)
    finally:
        stopping.cancel()
        await asyncio.wait({stopping})


async def _first_look(
    given: Settings, stop: asyncio.Event, *, reads_only: bool
) -> AgreedSettings | None:
    """Return the stored settings; None if they cannot be read yet, or `stop` is set.

    Raises:
        ConfigurationError: the environment contradicts them, or the schema is too new.
    """
    reading = asyncio.create_task(_read_once(given, reads_only=reads_only))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            return None
        found = reading.result()
    except (TimeoutError, SchemaOlderError, *DATABASE_ERRORS):
        return None
    finally:
        for task in (reading, stopping):
            task.cancel()
        await asyncio.wait({reading, stopping})
    found.values.refuse_other(given)
    return found


async def _read(engine: AsyncEngine, settings: Settings, *, reads_only: bool) -> AgreedSettings:
    """Return the stored settings, or the settings of this process if none are stored yet."""
    here = AgreedValues.from_settings(settings)
    if not reads_only:
        return await read_or_store(engine, here)
    async with engine.connect() as connection:
        return await read_agreed(connection) or AgreedSettings(here)


async def _read_once(given: Settings, *, reads_only: bool) -> AgreedSettings:
    engine = create_engine(given)
    try:
        async with asyncio.timeout(_FIRST_LOOK_S):
            (await read_revision(engine)).check()
            return await _read(engine, given, reads_only=reads_only)
    finally:
        await engine.dispose()
