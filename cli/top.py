"""`outbox top`: a live view of senders, their limits and waiting mail, and endpoints."""

from __future__ import annotations

import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Final

import typer
from outbox.v1.dispatcher_pb2 import DispatcherRates, DispatcherStatus
from outbox.v1.dispatcher_service_pb2 import GetDispatcherStatusRequest, ListDispatchersRequest
from outbox.v1.email_job_service_pb2 import ExplainEmailJobRequest, ExplainEmailJobResponse
from outbox.v1.sender_pb2 import Sender
from outbox.v1.sender_service_pb2 import (
    ListSendersRequest,
    PauseSenderRequest,
    ResumeSenderRequest,
)
from outbox.v1.server_service_pb2 import GetServerInfoRequest
from outbox.v1.stats_pb2 import EndpointStats, SenderStats
from outbox.v1.stats_service_pb2 import GetSenderStatsRequest, ListEndpointStatsRequest
from outbox_client import CallError, Client, InvalidArgument, PermissionDenied, Unauthenticated
from rich.console import Console
from rich.live import Live

from outbox_server.cli.addresses import dispatcher_addresses
from outbox_server.cli.call_errors import in_brief
from outbox_server.cli.client import Server, connection, connection_to
from outbox_server.cli.client_options import CONNECTION_PANEL
from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.options import User
from outbox_server.cli.output import Output, OutputFormat, print_json, to_document
from outbox_server.cli.top_view import SenderView, View, draw, help_screen

# The number of senders that fit on a screen and need few calls per refresh.
_MAX_SENDERS: Final = 30
_REFRESH_S: Final = 1.0
_RETRY_AFTER_S: Final = 10.0
# The time limit of a call of a dispatcher.
_DISPATCHER_TIMEOUT_S: Final = 2.0
_UP: Final = ("\x1b[A", "\x1bOA", "k")
_DOWN: Final = ("\x1b[B", "\x1bOB", "j")
# An arrow key sends three characters, "page down" four.
_KEY: Final = re.compile(r"\x1b[\[O](?:\d+~|.)|.", re.DOTALL)
_NEXT_PAGE: Final = ("\x1b[6~", "n")
_PREVIOUS_PAGE: Final = ("\x1b[5~", "b")
_QUIT: Final = ("q", "\x03", "\x04")

app = typer.Typer(add_completion=False)


@app.command()
def top(
    user: User = "",
    *,
    interval: Annotated[
        float, typer.Option("--interval", min=0.2, metavar="SECONDS", help="Refresh interval.")
    ] = _REFRESH_S,
    server: Server = None,
    stats_server: Annotated[
        str | None,
        typer.Option(
            "--stats-server",
            metavar="HOST:PORT",
            help="Address of the stats service.",
            rich_help_panel=CONNECTION_PANEL,
        ),
    ] = None,
    dispatchers: Annotated[
        list[str] | None,
        typer.Option(
            "--dispatcher",
            metavar="HOST:PORT",
            help="Address of a dispatcher, which knows all others too. Repeatable "
            "(default: all of `outbox up`).",
            rich_help_panel=CONNECTION_PANEL,
        ),
    ] = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Watch senders live: used limits, waiting mail with reasons, and endpoint health.

    Keys: up and down select a sender; p pauses it, r resumes it, and e explains
    its first waiting mail. Page up and down (or b and n) turn the page if there
    are more than 30 senders. ? shows help, q quits. `-o json` prints one snapshot,
    or fails if the scheduler or stats does not answer.

    $ outbox top --user acme
    """
    with ExitStack() as stack:
        scheduler = stack.enter_context(connection("scheduler", server))
        stats = stack.enter_context(connection("stats", stats_server))
        monitor = _Monitor(
            stack,
            user,
            scheduler,
            stats,
            [
                _Dispatcher(address.target, stack.enter_context(connection_to(address)))
                for address in dispatcher_addresses(dispatchers or ())
            ],
        )
        if output is OutputFormat.JSON:
            for service, address in (("scheduler", server), ("stats", stats_server)):
                # One connection per service, so that an error names the service in trouble.
                with connection(service, address) as client:
                    client.server.GetServerInfo(GetServerInfoRequest())
            print_json(_document(monitor.refresh(strict=True)))
            return
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise CommandFailed("top needs a terminal; `-o json` works without one")
        console = Console(markup=False, highlight=False, emoji=False)
        if console.is_dumb_terminal:
            name = os.environ["TERM"]
            raise CommandFailed(
                f"top needs a terminal that can move the cursor (TERM is {name!r}); "
                "`-o json` works without one"
            )
        _show(monitor, interval, console)


@dataclass
class _Dispatcher:
    """The connection to a dispatcher."""

    address: str
    client: Client
    # An unreachable dispatcher must not slow down every refresh. Its trouble stays until then.
    ask_at: float = 0.0
    trouble: str = ""


@dataclass
class _Monitor:
    """The connections to the services, and the state of the view."""

    stack: ExitStack
    user: str
    scheduler: Client
    stats: Client
    dispatchers: Sequence[_Dispatcher]
    message: str = ""
    shows_help: bool = False
    selected: int = 0
    view: View = field(default_factory=lambda: View(datetime.now(UTC)))

    def __post_init__(self) -> None:
        # The tokens of the pages up to the one shown, and the token of the next page.
        self._pages = [""]
        self._next_page = ""
        # The calls for all senders run in parallel, so that a refresh waits for the slowest only.
        self._pool = self.stack.enter_context(ThreadPoolExecutor(_MAX_SENDERS))

    def refresh(self, *, strict: bool = False) -> View:
        """Query all three services. An unreachable one becomes a line of the view.

        Raises:
            CallError: the next refresh would be refused as well, such as for a missing user. With
                `strict`, any error of the scheduler or stats.
        """
        senders: list[SenderView] = []
        dispatchers: list[DispatcherStatus] = []
        endpoints: Sequence[EndpointStats] = ()
        troubles: list[str] = []
        try:
            page = self.scheduler.senders.ListSenders(
                ListSendersRequest(
                    user_id=self.user, page_size=_MAX_SENDERS, page_token=self._pages[-1]
                )
            )
            self._next_page = page.next_page_token
            senders.extend(self._pool.map(self._ask, page.senders))
            endpoints = self._ask_endpoints()
        except (InvalidArgument, PermissionDenied, Unauthenticated):
            raise
        except CallError as error:
            if strict:
                raise
            troubles.append(in_brief(error, "the scheduler or the stats service"))
        now = time.monotonic()
        asked = [each for each in self.dispatchers if now >= each.ask_at]
        answering: list[_Dispatcher] = []
        for each, answer in zip(asked, self._pool.map(_ask_dispatcher, asked), strict=True):
            each.trouble = ""
            if isinstance(answer, DispatcherStatus):
                dispatchers.append(answer)
                answering.append(each)
            else:
                each.trouble = f"dispatcher {each.address}: {answer}"
        if answering:
            dispatchers += _others(answering[0], {each.dispatcher_id for each in dispatchers})
        troubles += [each.trouble for each in self.dispatchers if each.trouble]
        troubles += sorted(filter(None, {_held(each) for each in dispatchers}))
        self.view = View(
            datetime.now(UTC),
            senders,
            dispatchers,
            endpoints,
            troubles,
            page=len(self._pages),
            more=bool(self._next_page),
        )
        self.selected = min(self.selected, max(len(senders) - 1, 0))
        return self.view

    def _ask(self, sender: Sender) -> SenderView:
        stats = self.stats.stats.GetSenderStats(
            GetSenderStatsRequest(sender_id=sender.sender_id, user_id=self.user)
        )
        return SenderView(sender, stats, self._explain(stats))

    def _ask_endpoints(self) -> Sequence[EndpointStats]:
        if not self.dispatchers:
            return ()
        request = ListEndpointStatsRequest(user_id=self.user)
        return self.stats.stats.ListEndpointStats(request).endpoint_stats

    def _explain(self, stats: SenderStats) -> ExplainEmailJobResponse | None:
        """Return why a sender's first mail waits, or None if no mail waits."""
        if not stats.next_email_job_id:
            return None
        return self.scheduler.email_jobs.ExplainEmailJob(
            ExplainEmailJobRequest(email_job_id=stats.next_email_job_id, user_id=self.user)
        )

    def press(self, key: str) -> bool:
        """Handle a key, and return whether the view must be refreshed."""
        if key in _UP or key in _DOWN:
            step = 1 if key in _DOWN else -1
            last = max(len(self.view.senders) - 1, 0)
            self.selected = min(max(self.selected + step, 0), last)
            return False
        if key in _NEXT_PAGE and self._next_page:
            self._pages.append(self._next_page)
            self.selected = 0
            return True
        if key in _PREVIOUS_PAGE and len(self._pages) > 1:
            self._pages.pop()
            self.selected = 0
            return True
        if key == "?" or self.shows_help:
            self.shows_help = not self.shows_help
            return False
        if key not in ("p", "r", "e") or not self.view.senders:
            return False
        try:
            self.message = self._act(key, self.view.senders[self.selected])
        except CallError as error:
            self.message = in_brief(error, "the scheduler")
        return True

    def _act(self, key: str, shown: SenderView) -> str:
        sender_id, email = shown.sender.sender_id, shown.sender.email
        senders = self.scheduler.senders
        if key == "p":
            senders.PauseSender(PauseSenderRequest(sender_id=sender_id, user_id=self.user))
            return f"paused {email}"
        if key == "r":
            senders.ResumeSender(ResumeSenderRequest(sender_id=sender_id, user_id=self.user))
            return f"resumed {email}"
        found = self._explain(shown.stats)
        if found is None:
            return f"no mail of {email} is waiting"
        return f"{email}, job {found.email_job.email_job_id}: {found.explanation}"


def _ask_dispatcher(asked: _Dispatcher) -> DispatcherStatus | str:
    """Return the status of a dispatcher, or why there is none."""
    try:
        return asked.client.dispatcher.GetDispatcherStatus(
            GetDispatcherStatusRequest(), timeout=_DISPATCHER_TIMEOUT_S
        )
    except CallError as error:
        asked.ask_at = time.monotonic() + _RETRY_AFTER_S
        return in_brief(error)


def _others(asked: _Dispatcher, known: Collection[str]) -> list[DispatcherStatus]:
    """Return the running dispatchers that are not `known`, as they last reported themselves."""
    try:
        found = asked.client.dispatcher.ListDispatchers(
            ListDispatchersRequest(), timeout=_DISPATCHER_TIMEOUT_S
        )
    except CallError:
        # PostgreSQL cannot be reached, or this dispatcher has an older release. The view has those
        # that have answered themselves.
        return []
    return [
        DispatcherStatus(
            dispatcher_id=one.dispatcher_id,
            state=one.state,
            in_flight_count=one.in_flight_count,
            concurrency=one.concurrency,
            rates=DispatcherRates(
                sent_per_second=one.sent_per_second, attempts_per_second=one.attempts_per_second
            ),
        )
        for one in found.dispatchers
        if one.dispatcher_id not in known
    ]


def _held(status: DispatcherStatus) -> str:
    """Return the line of a held installation, which every dispatcher knows; empty if it is not."""
    if not status.HasField("hold_start_time"):
        return ""
    since = status.hold_start_time.ToDatetime(UTC)
    return (
        f"held since {since:%Y-%m-%d %H:%M:%S} UTC: only released mail is sent; see `outbox held`"
    )


def _show(monitor: _Monitor, interval: float, console: Console) -> None:
    with _raw_keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        next_refresh = 0.0
        while True:
            if time.monotonic() >= next_refresh:
                monitor.refresh()
                next_refresh = time.monotonic() + interval
            screen = draw(monitor.view, monitor.selected, monitor.message, console)
            live.update(help_screen() if monitor.shows_help else screen, refresh=True)
            for key in _read_keys(keys, max(next_refresh - time.monotonic(), 0.0)):
                if key in _QUIT:
                    return
                if monitor.press(key):
                    next_refresh = 0.0


@contextmanager
def _raw_keys() -> Iterator[int]:
    """Read single keys without echo, Ctrl-C included, and restore the terminal at the end."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor, termios.TCSANOW)
        # The processing of line ends stays as it was.
        now = termios.tcgetattr(descriptor)
        now[1] = before[1]
        termios.tcsetattr(descriptor, termios.TCSANOW, now)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _read_keys(descriptor: int, seconds: float) -> list[str]:
    """Return the keys pressed within `seconds`. The sequence of an arrow key is one key."""
    ready, _, _ = select.select([descriptor], [], [], seconds)
    if not ready:
        return []
    data = os.read(descriptor, 64)
    # A closed terminal counts as `q`.
    return _KEY.findall(data.decode("utf-8", "replace")) if data else ["q"]


def _document(view: View) -> dict[str, object]:
    return {
        "senders": [
            {
                "sender": to_document(each.sender),
                "stats": to_document(each.stats),
                "waits": None if each.waits is None else to_document(each.waits),
            }
            for each in view.senders
        ],
        "dispatchers": [to_document(each) for each in view.dispatchers],
        "endpoints": [to_document(each) for each in view.endpoints],
        "troubles": list(view.troubles),
    }
