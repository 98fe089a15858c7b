"""Where the stack of `outbox up` is: the files for other commands, and the text for people."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Final

from outbox_server.cli.addresses import ENDPOINTS
from outbox_server.cli.simulated_provider import (
    ProviderChoice,
    closing_of_steps,
    lines_of,
    steps_of,
)
from outbox_server.cli.terminal import note
from outbox_server.deploy.embedded.supervisor import GATEWAY_PORT, LocalSystem
from outbox_server.deploy.ports import LOOPBACK
from outbox_server.deploy.private_files import write_private
from outbox_server.shared.durations import format_duration
from outbox_server.shared.settings import Settings

# A shell loads this file to use the stack from other programs.
_SHELL_VARIABLES: Final = ENDPOINTS.with_name("env")


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


def write_endpoints(found: dict[str, Any]) -> None:
    """Write the files by which client commands and shells find the stack."""
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


def remove_endpoints() -> None:
    """Remove the files that `write_endpoints` wrote."""
    ENDPOINTS.unlink(missing_ok=True)
    _SHELL_VARIABLES.unlink(missing_ok=True)


def _addresses(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the names and values of the shell variables."""
    return [
        ("SCHEDULER", found["scheduler"]),
        ("DISPATCHER", found["dispatchers"][0]),
        ("STATS", found["stats"]),
    ]


def warn_of_other_ports(found: dict[str, Any], settings: Settings) -> None:
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


def welcome(found: dict[str, Any], smtp: str | None, choice: ProviderChoice | None) -> str:
    """Return what is printed once the stack runs: addresses, folders and first commands."""
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
        f"redis       {without_password(found['redis_url'])}, with the URL in {ENDPOINTS}",
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
        return [f"mail        all mail goes to {without_password(smtp)}"]
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


def without_password(url: str | None) -> str:
    """Return a URL with asterisks in place of its password."""
    return re.sub(r"(://[^:@/]*):.*@", r"\1:***@", url or "")
