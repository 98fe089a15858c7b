"""A private Exim: authenticators for one fixed account, the appendfile transport for a Maildir."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from outbox_server.deploy.child import Child
from outbox_server.deploy.ports import LOOPBACK
from tests.mail_servers.authority import Authority
from tests.mail_servers.server import DOMAIN, MAILDIR, PASSWORD, USERNAME, MailServer, files_below

# The access control lists (ACL) to which a variant can add conditions.
_ACLS: Final = ("connect", "helo", "mail", "rcpt", "data")
_MAIN: Final = f"""\
primary_hostname = exim.example.com
local_interfaces = {LOOPBACK}
daemon_smtp_ports = %(port)d
domainlist local_domains = {DOMAIN}
acl_smtp_connect = acl_connect
acl_smtp_helo = acl_helo
acl_smtp_mail = acl_mail
acl_smtp_rcpt = acl_rcpt
acl_smtp_data = acl_data
tls_advertise_hosts = *
tls_certificate = /etc/mail.crt
tls_privatekey = /etc/mail.key
auth_advertise_hosts = ${{if def:tls_in_cipher{{*}}}}
# This root folder has no resolver, and needs none.
host_lookup =
rfc1413_hosts =
log_file_path = /var/log/exim/%%slog
log_selector = +smtp_connection +smtp_protocol_error +smtp_syntax_error +smtp_mailauth
# The default leaves mail in the queue from the eleventh of a connection on.
smtp_accept_queue_per_connection = 0
"""
_REST: Final = f"""\
begin acl
%(acls)s
begin routers
local:
  driver = accept
  domains = +local_domains
  local_parts = ^r[0-9]*\\$
  transport = maildir

begin transports
maildir:
  driver = appendfile
  directory = /{MAILDIR}
  maildir_format
  user = inbox
  group = inbox
  envelope_to_add
  return_path_add

begin authenticators
plain:
  driver = plaintext
  public_name = PLAIN
  server_condition = ${{if and{{{{eq{{$auth2}}{{{USERNAME}}}}}{{eq{{$auth3}}{{{PASSWORD}}}}}}}}}
  server_set_id = $auth2
login:
  driver = plaintext
  public_name = LOGIN
  server_prompts = Username:: : Password::
  server_condition = ${{if and{{{{eq{{$auth1}}{{{USERNAME}}}}}{{eq{{$auth2}}{{{PASSWORD}}}}}}}}}
  server_set_id = $auth1
"""
_LAST_CONDITIONS: Final = {
    "mail": "  require authenticated = *\n",
    "rcpt": "  require verify = recipient\n",
}


class Exim(MailServer):
    """Exim; `settings` are main options, `acls` are conditions put first into an ACL, by name."""

    name = "exim"

    def __init__(
        self,
        folder: Path,
        authority: Authority,
        settings: str = "",
        acls: dict[str, str] | None = None,
    ) -> None:
        self._acls = acls or {}
        super().__init__(folder, authority, settings)

    def _prepare(self) -> None:
        self.root.folder("var/spool/exim4", "Debian-exim", 0o750)
        self.root.folder("var/log/exim", "Debian-exim")
        self.root.folder("var/mail", "inbox")
        self.root.path.joinpath("etc/mail.key").chmod(0o644)

    def _configure(self) -> Child:
        lines = [
            f"acl_{name}:\n{self._acls.get(name, '')}\n{_LAST_CONDITIONS.get(name, '')}  accept\n"
            for name in _ACLS
        ]
        main = _MAIN % {"port": self.port}
        rest = _REST % {"acls": "\n".join(lines)}
        self.root.write("etc/exim4/exim4.conf", f"{main}{self.settings}\n{rest}")
        return self.root.child("Exim", "/usr/sbin/exim4", "-bdf")

    def queued(self) -> int:
        files = files_below(self.root.path / "var/spool/exim4/input")
        return sum(file.endswith("-H") for file in files)

    def log(self) -> str:
        files = sorted((self.root.path / "var/log/exim").iterdir())
        return "".join(file.read_text(errors="replace") for file in files)
