"""A private Postfix: Cyrus SASL with a sasldb for AUTH, the virtual agent for a Maildir."""

from __future__ import annotations

import os
from typing import Final

from outbox_server.deploy.child import Child
from outbox_server.deploy.ports import LOOPBACK
from tests.mail_servers.root import USERS
from tests.mail_servers.server import DOMAIN, MAILDIR, PASSWORD, USERNAME, MailServer, files_below

_HOST: Final = "postfix.example.com"
_MAIN: Final = f"""\
compatibility_level = 3.7
myhostname = {_HOST}
mydestination =
mynetworks =
alias_maps =
alias_database =
# This root folder has no resolver, and needs none.
disable_dns_lookups = yes
smtp_dns_support_level = disabled
inet_interfaces = {LOOPBACK}
inet_protocols = ipv4
maillog_file = /var/log/postfix.log
virtual_mailbox_domains = {DOMAIN}
virtual_mailbox_base = /
virtual_mailbox_maps = regexp:/etc/postfix/mailboxes
virtual_uid_maps = static:{USERS["inbox"]}
virtual_gid_maps = static:{USERS["inbox"]}
virtual_mailbox_limit = 0
mailbox_size_limit = 0
smtpd_tls_security_level = encrypt
smtpd_tls_cert_file = /etc/mail.crt
smtpd_tls_key_file = /etc/mail.key
smtpd_tls_session_cache_database =
# OpenSSL asks the kernel itself.
tls_random_source =
smtpd_sasl_auth_enable = yes
smtpd_sasl_path = smtpd
cyrus_sasl_config_path = /etc/sasl
smtpd_sasl_local_domain = {_HOST}
smtpd_sasl_security_options = noanonymous
smtpd_relay_restrictions = permit_auth_destination, reject
smtpd_client_restrictions = permit_sasl_authenticated, reject
smtpd_delay_reject = yes
# The default exempts this machine's own addresses from all limits of rate and connections.
smtpd_client_event_limit_exceptions =
"""
_SERVICES: Final = """\
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""
# The queues that `postfix check` would create, with owner, group and mode.
_QUEUES: Final = ("active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming")


class Postfix(MailServer):
    """Postfix; `settings` are lines of main.cf, of which later ones take precedence."""

    name = "postfix"

    def _prepare(self) -> None:
        spool = "var/spool/postfix"
        for queue in (*_QUEUES, "private", "saved", "trace"):
            self.root.folder(f"{spool}/{queue}", "postfix", 0o700, group="root")
        self.root.folder(f"{spool}/pid")
        self.root.folder(f"{spool}/maildrop", "postfix", 0o730, group="postdrop")
        self.root.folder(f"{spool}/public", "postfix", 0o710, group="postdrop")
        self.root.folder("var/lib/postfix", "postfix", 0o755)
        self.root.folder("var/mail", "inbox")
        self.root.write(
            "etc/sasl/smtpd.conf",
            "pwcheck_method: auxprop\nauxprop_plugin: sasldb\nmech_list: PLAIN LOGIN\n"
            "sasldb_path: /etc/sasldb2\n",
        )
        self.root.run(
            "/usr/sbin/saslpasswd2", "-p", "-c", "-f", "/etc/sasldb2", "-u", _HOST, USERNAME,
            stdin=PASSWORD,
        )  # fmt: skip
        (self.root.path / "etc/sasldb2").chmod(0o644)

    def _configure(self) -> Child:
        smtpd = f"{LOOPBACK}:{self.port} inet n - n - - smtpd\n"
        self.root.write("etc/postfix/mailboxes", f"/^r[0-9]*@/ {MAILDIR}/\n")
        main = self.root.write("etc/postfix/main.cf", f"{_MAIN}{self.settings}\n")
        # Postfix waits for a second if a file has just been written.
        os.utime(main, (0, 0))
        self.root.write("etc/postfix/master.cf", smtpd + _SERVICES)
        return self.root.child("Postfix", "/usr/lib/postfix/sbin/master", "-c", "/etc/postfix")

    def queued(self) -> int:
        spool = self.root.path / "var/spool/postfix"
        queues = ("maildrop", "incoming", "active", "deferred")
        return sum(len(files_below(spool / queue)) for queue in queues)

    def log(self) -> str:
        file = self.root.path / "var/log/postfix.log"
        return file.read_text(errors="replace") if file.exists() else ""
