"""`outbox up`: runs the embedded stack until Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import typer

from outbox_server.cli.client import ENDPOINTS
from outbox_server.cli.foreground import run
from outbox_server.cli.options import text_or_file
from outbox_server.cli.output import Output, OutputFormat, print_json
from outbox_server.cli.simulated_provider import (
    NAMES,
    ProviderChoice,
    chosen_provider,
    closing_line,
    closing_of_steps,
    lines_of,
    read_provider,
    steps_of,
)
from outbox_server.cli.terminal import note, say
from outbox_server.deploy.embedded.supervisor import GATEWAY_PORT, LocalSystem
from outbox_server.deploy.envoy.files import envoy_command
from outbox_server.deploy.ports import LOOPBACK
from outbox_server.deploy.private_files import private_folder, write_private
from outbox_server.deploy.providers.profile import Profile
from outbox_server.shared.settings import Settings, format_duration, load_settings

# A shell loads this file to use the stack from other programs.
_SHELL_VARIABLES: Final = ENDPOINTS.with_name("env")

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
        _write(found)
        try:
            if output is OutputFormat.JSON:
                print_json(found | {"redis_url": _without_password(found["redis_url"])})
            else:
                say(_welcome(found, smtp, choice))
            _warn_of_other_ports(found, settings)
            note(f"ready after {time.monotonic() - began:.1f} s; Ctrl-C stops everything")
            await system.watch()
        finally:
            ENDPOINTS.unlink(missing_ok=True)
            _SHELL_VARIABLES.unlink(missing_ok=True)
            if system.servers.provider is not None:
                note(closing_line(system.servers.provider))


def endpoints_of(system: LocalSystem, settings: Settings) -> dict[str, Any]:
    """Return the addresses and folders of the stack, for client commands and for the output."""
    servers = system.servers
    receives_mail = servers.inbox is not None or servers.provider is not None
    return {
        "scheduler": system.scheduler,
        "stats": system.stats,
        "dispatchers": system.dispatchers,
        "gateway": system.gateway_url,
        "database_url": servers.database_url,
        "redis_url": servers.redis_url,
        "api_key_file": system.operator_key and str(system.operator_key),
        "smtp_url": servers.smtp_url if receives_mail else None,
        "inbox": str(servers.maildir) if receives_mail else None,
        "provider": servers.provider and servers.provider.server.profile.name,
        "metrics": {
            service.title: f"http://{service.metrics}/metrics"
            for service in system.services
            if service.metrics
        },
        "logs": str(system.folder / "logs"),
        # `outbox audit` compares with these.
        "settings": {
            name: format_duration(getattr(settings, name))
            for name in ("rate_window", "min_gap", "lease")
        },
        "pid": os.getpid(),
    }


def _write(found: dict[str, Any]) -> None:
    pairs = _addresses(found) + ([("GATEWAY", found["gateway"])] if found["gateway"] else [])
    variables = "".join(f"{name}={shlex.quote(value)}\n" for name, value in pairs)
    if found["api_key_file"]:
        # Exported, so that grpcurl and the examples find it.
        variables += f"export OUTBOX_API_KEY={Path(found['api_key_file']).read_text().strip()}\n"
    for path, content in (
        (ENDPOINTS, json.dumps(found, indent=2) + "\n"),
        (_SHELL_VARIABLES, f"# Load with: . {_SHELL_VARIABLES}\n{variables}"),
    ):
        write_private(path, content)


def _addresses(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the names and values of the shell variables."""
    return [
        ("SCHEDULER", found["scheduler"]),
        ("DISPATCHER", found["dispatchers"][0]),
        ("STATS", found["stats"]),
    ]


def _warn_of_other_ports(found: dict[str, Any], settings: Settings) -> None:
    """Warn if another program uses a default port."""
    taken = [
        usual
        for name, address in _addresses(found)
        if (field := f"{name.lower()}_listen") not in settings.model_fields_set
        and address != (usual := Settings.model_fields[field].default)
    ]
    usual_gateway = f"{LOOPBACK}:{GATEWAY_PORT}"
    if found["gateway"] not in (None, f"http://{usual_gateway}"):
        taken.append(usual_gateway)
    if taken:
        note(
            f"WARNING: {', '.join(taken)}: in use by another program, perhaps another stack. This "
            f"stack uses the addresses above; `. {_SHELL_VARIABLES}` sets $SCHEDULER, $DISPATCHER "
            "and $STATS to them."
        )


def _print_event(text: str) -> None:
    note(f"outbox up: {text}")


def _note_unused_settings(settings: Settings, smtp: str | None) -> None:
    for name in sorted(settings.model_fields_set.intersection(_SET_BY_UP)):
        asks = name == "smtp_url" and smtp is None
        hint = "; name the relay with --smtp or --smtp-file" if asks else ""
        note(f"OUTBOX_{name.upper()} is not used by `outbox up`{hint}")


def _welcome(found: dict[str, Any], smtp: str | None, choice: ProviderChoice | None) -> str:
    lines = [
        "",
        f"scheduler   {found['scheduler']}",
        f"stats       {found['stats']}",
        *(f"dispatcher  {address}" for address in found["dispatchers"]),
        *(
            [f"gateway     {found['gateway']}, try the API: {found['gateway']}/docs"]
            if found["gateway"]
            else []
        ),
        f"postgresql  {found['database_url']}",
        f"redis       {_without_password(found['redis_url'])}, with the URL in {ENDPOINTS}",
        *([f"API key     {file}, of an operator"] if (file := found["api_key_file"]) else []),
        *_mail_lines(found, smtp, choice),
        *(f"metrics     {url} ({title})" for title, url in found["metrics"].items()),
        f"logs        {found['logs']}",
        "",
        "In another terminal, in this folder:",
        "",
        *(f"  {line}" for line in examples(found, choice)),
        "",
        *([] if choice is None else [*closing_of_steps(_command("outbox")), ""]),
    ]
    return "\n".join(lines) + "\n"


def _mail_lines(
    found: dict[str, Any], smtp: str | None, choice: ProviderChoice | None
) -> list[str]:
    if choice is not None:
        return list(lines_of(found, choice))
    if smtp is not None:
        return [f"mail        all mail goes to {_without_password(smtp)}"]
    return [f"inbox       {found['smtp_url']}, mails in {found['inbox']}"]


def examples(found: dict[str, Any], choice: ProviderChoice | None) -> list[str]:
    """Return example commands, each of which works when pasted after the previous ones."""
    if choice is not None:
        return steps_of(choice.profile, _command("outbox"))
    grpcurl, outbox = _command("grpcurl"), _command("outbox")
    sender = {"user_id": "acme", "sender": {"email": "news@example.com"}}
    options = {
        # Lines that are pasted again make another sender and another batch.
        "request_id": "SENDER-1",
        "sender_id": "SENDER",
        "subject": "Hello {{ name }}",
        "body": "Good to see you, {{ name }}.",
    }
    rows = [
        {"email": "ann@example.com", "columns": {"name": "Ann"}},
        {"email": "ben@example.com", "columns": {"name": "Ben"}},
    ]
    # The shell inserts the sender's id, so the quotes of the document end before it.
    stats = _quoted({"sender_id": "SENDER"}).replace("SENDER", "'$sender'")
    batch = _quoted({"options": options, "recipients": {"rows": rows}}).replace(
        "SENDER", "'$sender'"
    )
    scheduler, service = found["scheduler"], "outbox.v1.SenderService/CreateSender"
    # grpcurl prints senderId if it reads the contract from a file.
    find_id = r"""sed -n 's/.*"sender_*[Ii]d": "\(.*\)".*/\1/p'"""
    call = f"{grpcurl} -plaintext"
    if found["api_key_file"]:
        # The key is not among the arguments, which every user of this machine can see.
        call += " -expand-headers -H 'authorization: Bearer ${OUTBOX_API_KEY}'"
    return [
        *([f". {_SHELL_VARIABLES}"] if found["api_key_file"] else []),
        f"{grpcurl} -plaintext {scheduler} list",
        f"sender=$({call} -d {_quoted(sender)} {scheduler} {service} | {find_id})",
        f"{call} -d {batch} {scheduler} outbox.v1.BatchService/ScheduleBatch",
        f"{call} -d {stats} {found['stats']} outbox.v1.StatsService/GetSenderStats",
        f"{outbox} jobs list --sender $sender",
    ]


def _quoted(document: dict[str, Any]) -> str:
    return shlex.quote(json.dumps(document))


def _command(name: str) -> str:
    """Return the shortest path for a shell to a command in the folder of this Python."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        return name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _without_password(url: str | None) -> str:
    return re.sub(r"(://[^:@/]*):.*@", r"\1:***@", url or "")
