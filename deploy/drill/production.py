"""The production configuration of a drill: TLS, passwords, an API key, and secrets in files.

The embedded PostgreSQL and Valkey are built without TLS. The proxies in front of them end it, so
that the services verify a certificate and encrypt, and the servers behind only ask for passwords.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import grpc

from outbox_server.deploy.certificates import Certificate, self_signed, server_context
from outbox_server.deploy.drill.database import store_key
from outbox_server.deploy.drill.hostile import HOSTILE_USER
from outbox_server.deploy.drill.load import USERS
from outbox_server.deploy.drill.operator import OPERATOR
from outbox_server.deploy.embedded.encryption_key import key_in
from outbox_server.deploy.embedded.passwords import OWNER, PasswordFile
from outbox_server.deploy.ports import LOOPBACK
from outbox_server.deploy.private_files import write_private
from outbox_server.shared.auth.keys import NewKey, make_key
from outbox_server.shared.database.migrating import migrate

# The ALPN name of PostgreSQL's protocol, which a client sends that begins with TLS.
_POSTGRES_ALPN: Final = "postgresql"


class ProductionConfiguration:
    """The certificates and secrets of one stack. `stores` is the certificate of its proxies."""

    def __init__(self, folder: Path, stores: Certificate) -> None:
        self._folder = folder
        self._stores = stores
        # Not the certificate of the stores: a client that trusts only that one must fail.
        self._services = self_signed(folder / "services")
        self._keys = {name: make_key() for name in (*USERS, HOSTILE_USER, OPERATOR)}
        self._database_password = PasswordFile(folder / "postgres").password_of(OWNER)

    @property
    def contexts(self) -> dict[str, ssl.SSLContext]:
        """The TLS contexts of the proxies, by the server behind."""
        found = {name: server_context(self._stores) for name in ("postgres", "redis", "smtp")}
        found["postgres"].set_alpn_protocols([_POSTGRES_ALPN])
        return found

    @property
    def credentials(self) -> dict[str, grpc.ChannelCredentials]:
        """The credentials of each user and of the operator, who trust the services' certificate.

        grpc sends the key only over TLS.
        """
        return {name: self._credentials_with(key) for name, key in self._keys.items()}

    def _credentials_with(self, key: NewKey) -> grpc.ChannelCredentials:
        return grpc.composite_channel_credentials(
            grpc.ssl_channel_credentials(self._services.public.read_bytes()),
            grpc.access_token_call_credentials(key.text),
        )

    def environment(self, ports: Mapping[str, int], redis_password: str) -> dict[str, str]:
        """Write the secrets into files, and return the variables of the services.

        `ports` has the ports of the proxies. A variable that is empty counts as not set.
        """
        folder = self._folder / "secrets"
        folder.mkdir(mode=0o700)
        values = {
            "DATABASE_URL": self._database_url(ports["postgres"]),
            "REDIS_URL": f"rediss://:{redis_password}@{LOOPBACK}:{ports['redis']}/0"
            f"?ssl_ca_certs={self._stores.public}",
            "SMTP_URL": f"smtps://drill:drill@{LOOPBACK}:{ports['smtp']}",
            "ENCRYPTION_KEYS": key_in(self._folder),
        }
        found = {
            "OUTBOX_AUTH": "keys",
            "OUTBOX_TLS_CERTIFICATE": str(self._services.public),
            "OUTBOX_TLS_KEY": str(self._services.private),
        }
        for name, value in values.items():
            file = folder / name.lower()
            write_private(file, value + "\n")
            found |= {f"OUTBOX_{name}": "", f"OUTBOX_{name}_FILE": str(file)}
        return found

    def prepare_database(self, port: int) -> None:
        """Migrate by way of the proxy at `port`, and store the keys.

        Called in a thread, while the event loop of the proxy runs in another one.
        """
        url = self._database_url(port)
        migrate(url)
        for name, key in self._keys.items():
            asyncio.run(store_key(url, key, None if name == OPERATOR else name))

    def _database_url(self, port: int) -> str:
        return (
            f"postgresql://{OWNER}:{self._database_password}@{LOOPBACK}:{port}/outbox"
            # TLS from the first byte (PostgreSQL 17 or later), as the proxy does not speak the
            # protocol by which clients ask for TLS.
            f"?sslmode=verify-full&sslrootcert={self._stores.public}&sslnegotiation=direct"
        )
