"""`outbox up`: runs the embedded stack until Ctrl-C."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

import typer

from outbox_server.cli.addresses import ENDPOINTS
from outbox_server.cli.foreground import run
from outbox_server.cli.options import text_or_file
from outbox_server.cli.output import Output, OutputFormat, print_json
from outbox_server.cli.simulated_provider import (
    NAMES,
    ProviderChoice,
    chosen_provider,
    closing_line,
    read_provider,
)
from outbox_server.cli.terminal import note, say
from outbox_server.cli.up_output import (
    endpoints_of,
    remove_endpoints,
    warn_of_other_ports,
    welcome,
    without_password,
    write_endpoints,
)
from outbox_server.deploy.embedded.supervisor import LocalSystem
from outbox_server.deploy.envoy.files import envoy_command
from outbox_server.deploy.private_files import private_folder
from outbox_server.deploy.providers.profile import Profile
from outbox_server.shared.settings import Settings, load_settings

# Settings that `up` sets itself and ignores in the environment.
_SET_BY_UP: Final = frozenset(
    (
        *("database_url", "redis_url", "smtp_url", "smtp_override"),
        *("tls_certificate", "tls_key", "tls_client_ca", "metrics_listen"),
    )
)

_SCHEMES: Final = ("smtp", "smtps", "smtp+starttls")

app = typer.Typer(add_completion=False)


def _relay(text: str) -> str:
    """Return the URL of a relay, checked before anything starts."""
    if urlsplit(text).password:
        raise typer.BadParameter(
            "every user of this machine can see a password among the arguments of a process: write "
            "the URL into a file, and name it with --smtp-file"
        )
    return _checked_relay(text)


def _checked_relay(text: str) -> str:
    url = urlsplit(text)
    if url.scheme not in _SCHEMES or not url.hostname:
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise typer.BadParameter(f"must be one of {known}, followed by [user:password@]host:port")
    return text


@app.command()
def up(
    *,
    dispatchers: Annotated[
        int, typer.Option("--dispatchers", min=1, max=64, help="Number of dispatchers.")
    ] = 1,
    smtp: Annotated[
        str | None,
        typer.Option(
            "--smtp",
            parser=_relay,
            metavar="URL",
            help="Send all mail to this relay (smtp://host:port, smtps://, smtp+starttls://) "
            "instead of the development inbox.",
        ),
    ] = None,
    smtp_file: Annotated[
        Path | None,
        typer.Option(
            "--smtp-file",
            help="The same in a file, which contains only the URL: required if the URL has a "
            "password. - is stdin.",
        ),
    ] = None,
    gateway: Annotated[
        bool,
        typer.Option(
            "--gateway",
            help="Also run Envoy: REST, gRPC-Web and gRPC on one port, with a page to try the API.",
        ),
    ] = False,
    provider: Annotated[
        Profile | None,
        typer.Option(
            "--provider",
            parser=read_provider,
            metavar="NAME",
            help="Send all mail to a simulated mail provider, with its limits and replies, "
            f"instead of the development inbox: {NAMES}.",
        ),
    ] = None,
    provider_quota: Annotated[
        int | None,
        typer.Option(
            "--provider-quota",
            min=1,
            help="Mails that the provider allows in its longest period (default: its real limit).",
        ),
    ] = None,
    provider_scale: Annotated[
        float | None,
        typer.Option(
            "--provider-scale",
            min=0.00001,
            max=1,
            help="Multiply the provider's times, and OUTBOX_COOLDOWN, OUTBOX_QUOTA_DAY and "
            "OUTBOX_DEFER_BACKOFF, by this factor: 0.001 makes a day 86 s.",
        ),
    ] = None,
    metrics: Annotated[
        bool,
        typer.Option("--metrics", help="Serve each service's Prometheus metrics at a free port."),
    ] = False,
    hold: Annotated[
        bool,
        typer.Option(
            "--hold",
            help="First hold the installation: nothing is sent until you release it "
            "(`outbox held`).",
        ),
    ] = False,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Run the complete system on this machine until Ctrl-C.

    Starts PostgreSQL, Valkey, a development inbox that accepts every mail,
    the scheduler, the stats service and the dispatchers, all on loopback.
    Processes that crash are restarted. The data stays in .outbox/ of the
    current folder.

    Each server uses its default port, or a free one if that is in use.
    `. .outbox/env` sets $SCHEDULER, $DISPATCHER, $STATS and $GATEWAY in a
    shell to the addresses. The services get all OUTBOX_* variables, such as OUTBOX_MIN_GAP.

    Other users of this machine can read neither .outbox/ nor the databases,
    but they can reach the ports of the services: with OUTBOX_AUTH=keys, calls
    need an API key. Commands in this folder then use the operator's key in
    .outbox/.

    $ outbox up --dispatchers 2

    $ outbox up --gateway

    $ outbox up --provider gmail --provider-quota 20 --provider-scale 0.001
    """
    url = text_or_file(smtp, smtp_file, "--smtp and --smtp-file")
    smtp = None if url is None else _checked_relay(url.strip())
    choice = chosen_provider(provider, scale=provider_scale, quota=provider_quota, smtp=smtp)
    settings = load_settings()
    _note_unused_settings(settings, smtp)
    if choice is not None:
        settings = choice.settings(settings)
    if gateway:
        # Before anything starts, because it may not be installed.
        envoy_command(ENDPOINTS.parent)
    run(
        lambda: _run_stack(
            settings,
            dispatchers,
            smtp,
            choice,
            output,
            metrics=metrics,
            gateway=gateway,
            hold=hold,
        ),
        lambda: note("stopping ..."),
    )


async def _run_stack(
    settings: Settings,
    dispatchers: int,
    smtp: str | None,
    choice: ProviderChoice | None,
    output: OutputFormat,
    *,
    metrics: bool,
    gateway: bool,
    hold: bool,
) -> None:
    began = time.monotonic()
    folder = ENDPOINTS.parent
    private_folder(folder)
    # Data, keys and mails must not be committed.
    (folder / ".gitignore").write_text("*\n")
    profile = None if choice is None else choice.profile
    system = LocalSystem(
        folder,
        settings,
        dispatchers=dispatchers,
        smtp_url=smtp,
        provider=profile,
        metrics=metrics,
        gateway=gateway,
        hold=hold,
        keys=settings.auth == "keys" and "auth" in settings.model_fields_set,
        say=_print_event,
    )
    note("starting ...")
    async with system:
        found = endpoints_of(system, settings)
        write_endpoints(found)
        try:
            if output is OutputFormat.JSON:
                print_json(found | {"redis_url": without_password(found["redis_url"])})
            else:
                say(welcome(found, smtp, choice))
            warn_of_other_ports(found, settings)
            note(f"ready after {time.monotonic() - began:.1f} s; Ctrl-C stops everything")
            await system.watch()
        finally:
            remove_endpoints()
            if system.servers.provider is not None:
                note(closing_line(system.servers.provider))


def _print_event(text: str) -> None:
    note(f"outbox up: {text}")


def _note_unused_settings(settings: Settings, smtp: str | None) -> None:
    for name in sorted(settings.model_fields_set.intersection(_SET_BY_UP)):
        asks = name == "smtp_url" and smtp is None
        hint = "; name the relay with --smtp or --smtp-file" if asks else ""
        note(f"OUTBOX_{name.upper()} is not used by `outbox up`{hint}")
