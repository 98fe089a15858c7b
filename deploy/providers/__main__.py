"""Runs one simulated provider: `python -m outbox_server.deploy.providers gmail --port 1587`.

Prints the provider's limits, and its counts as one line of JSON at SIGUSR1 and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from pathlib import Path

from outbox_server.deploy.certificates import self_signed, server_context
from outbox_server.deploy.child import LocalServerError
from outbox_server.deploy.mail_store import MailStore
from outbox_server.deploy.providers.catalog import PROFILES
from outbox_server.deploy.providers.describe import describe
from outbox_server.deploy.providers.profile import Profile
from outbox_server.deploy.providers.sasl import Account
from outbox_server.deploy.providers.server import Provider
from outbox_server.deploy.providers.tally import Tally


def main() -> int:
    """Run a provider until SIGTERM or SIGINT."""
    options = _parser().parse_args()
    profile: Profile = PROFILES[options.profile].scaled(options.scale)
    if options.quota is not None:
        profile = profile.with_quota(options.quota)
    with tempfile.TemporaryDirectory(prefix="outbox-provider-") as folder:
        certificate = self_signed(options.certificates or Path(folder))
        provider = Provider(
            profile,
            port=options.port,
            accounts={options.user: Account(options.password, {options.token})},
            tls=None if options.no_tls else server_context(certificate),
            implicit_tls=options.implicit_tls,
            tally=Tally(options.tally),
            store=None if options.maildir is None else MailStore(options.maildir),
        )
        try:
            asyncio.run(_serve(provider, options.user, certificate.public))
        except LocalServerError as error:
            sys.stderr.write(f"{error}\n")
            return 1
    return 0


async def _serve(provider: Provider, user: str, certificate: Path) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGUSR1, lambda: _print(provider.tally))
    async with provider:
        lines = [f"{provider.profile.title}: {provider.url(user)}", f"certificate: {certificate}"]
        lines += [f"- {line}" for line in describe(provider.profile)]
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
        await stop.wait()
    _print(provider.tally)


def _print(tally: Tally) -> None:
    sys.stdout.write(json.dumps(tally.summary()) + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="outbox_server.deploy.providers", description=__doc__)
    parser.add_argument("profile", choices=sorted(PROFILES))
    parser.add_argument("--port", type=int, default=0, help="TCP port on 127.0.0.1; 0: a free one")
    parser.add_argument("--scale", type=_positive, default=1.0, help="multiplies all times")
    parser.add_argument("--quota", type=int, help="mails in the longest period of the profile")
    parser.add_argument("--user", default="outbox", help="the name of the one account")
    parser.add_argument("--password", default="outbox", help="its password")
    parser.add_argument("--token", default="outbox", help="its access token for OAuth 2.0")
    parser.add_argument("--no-tls", action="store_true", help="offer and require no TLS")
    parser.add_argument("--implicit-tls", action="store_true", help="TLS in place of STARTTLS")
    parser.add_argument("--certificates", type=Path, help="folder for the new certificate")
    parser.add_argument("--maildir", type=Path, help="store the mails in this Maildir")
    parser.add_argument("--tally", type=Path, help="append a JSON line per mail and connection")
    return parser


def _positive(text: str) -> float:
    number = float(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0 (got {text})")
    return number


if __name__ == "__main__":
    sys.exit(main())
