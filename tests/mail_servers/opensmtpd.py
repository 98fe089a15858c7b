"""A private OpenSMTPD: a table of credentials for AUTH, its own delivery agent for a Maildir."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from outbox_server.deploy.child import Child
from outbox_server.deploy.ports import LOOPBACK
from tests.mail_servers.authority import Authority
from tests.mail_servers.server import DOMAIN, MAILDIR, USERNAME, MailServer, files_below

# The hash of server.PASSWORD by crypt(3), SHA-256. OpenSMTPD's own hash (yescrypt) takes a third of
# a second at each login, and logins run one at a time.
_HASH: Final = "$5$outboxtests$dEDRceOMFOh7516IcMScNMSBbXxtXZRSH7uWXK11bI2"
_MAILBOXES: Final = 100
_CONFIGURATION: Final = f"""\
pki mail cert "/etc/mail.crt"
pki mail key "/etc/mail.key"
table credentials file:/etc/mail/credentials
table mailboxes file:/etc/mail/mailboxes
%(settings)s
listen on {LOOPBACK} port %(port)d hostname opensmtpd.example.com tls-require pki mail auth <credentials> %(listener)s
action "inbox" maildir "/{MAILDIR}" virtual <mailboxes>
match auth from any for domain "{DOMAIN}" action "inbox"
"""  # noqa: E501 - one directive, one line


class OpenSmtpd(MailServer):
    """OpenSMTPD; `settings` are lines of smtpd.conf, `listener` extends its listener line."""

    name = "opensmtpd"

    def __init__(
        self, folder: Path, authority: Authority, settings: str = "", listener: str = ""
    ) -> None:
        self._listener = listener
        super().__init__(folder, authority, settings)

    def _prepare(self) -> None:
        self.root.folder("var/spool/smtpd", mode=0o711)
        for folder in ("queue", "corrupt", "temporary", "incoming", "purge"):
            self.root.folder(f"var/spool/smtpd/{folder}", "opensmtpq", 0o700, group="root")
        self.root.folder("var/spool/smtpd/offline", mode=0o770, group="opensmtpq")
        self.root.folder("var/mail", "inbox")
        self.root.folder(MAILDIR, "inbox", 0o700)
        # It does not start without the CA certificates that it would trust as a client.
        self.root.write("etc/ssl/certs/ca-certificates.crt", self.authority.pem)
        numbers = ["", *range(1, _MAILBOXES + 1)]
        self.root.write(
            "etc/mail/mailboxes", "".join(f"r{number}@{DOMAIN} inbox\n" for number in numbers)
        )
        self.root.write(
            "etc/mail/credentials", f"{USERNAME} {_HASH}\n", owner="opensmtpd", mode=0o600
        )

    def _configure(self) -> Child:
        text = _CONFIGURATION % {
            "settings": self.settings,
            "port": self.port,
            "listener": self._listener,
        }
        self.root.write("etc/smtpd.conf", text)
        return self.root.child("OpenSMTPD", "/usr/sbin/smtpd", "-d")

    def queued(self) -> int:
        return len(files_below(self.root.path / "var/spool/smtpd/queue"))

    def log(self) -> str:
        return self.root.log.read_text(errors="replace")
