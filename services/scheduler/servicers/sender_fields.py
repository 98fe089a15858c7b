"""The fields of a sender that callers set: their checks, and the values of their columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from google.protobuf.field_mask_pb2 import FieldMask
from outbox.v1 import sender_pb2

from outbox_server.services.scheduler import senders
from outbox_server.services.scheduler.oauth2_credentials import OAuth2Credentials, check_credentials
from outbox_server.services.scheduler.servicers.calls import check_mask
from outbox_server.services.scheduler.smtp_presets import (
    PROVIDERS,
    PresetProvider,
    SmtpPreset,
    complete_address,
    provider_of,
)
from outbox_server.shared import bounds
from outbox_server.shared.errors import InvalidInput, Violations
from outbox_server.shared.rpc.proto_mapping import whole_ms
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.settings import Settings
from outbox_server.shared.smtp.endpoint import Endpoint
from outbox_server.shared.smtp_ports import PermittedPorts

_Columns = Mapping[str, Any]


class SenderFields:
    """Turns the fields of a message into the values of columns."""

    def __init__(self, settings: Settings, secrets: SecretBox, ports: PermittedPorts) -> None:
        """`ports` are those that a sender's own relay may have."""
        self._settings = settings
        self._secrets = secrets
        self._ports = ports
        self._columns: dict[str, Callable[[sender_pb2.Sender], _Columns]] = {
            "email": self._email,
            "display_name": self._display_name,
            "smtp": self._smtp,
            "hourly_limit": self._hourly_limit,
            "min_gap": self._min_gap,
            "max_in_flight": self._max_in_flight,
            "sending_hours": self._sending_hours,
        }

    def masked(self, sender: sender_pb2.Sender, mask: FieldMask | None) -> Iterable[str]:
        """Return the fields to change: those of the mask or, without a mask, those that are set.

        Raises:
            InvalidInput: UPDATE_MASK_INVALID.
        """
        if mask is None or not mask.paths:
            return [
                name
                for name in self._columns
                if (
                    sender.HasField(name)  # type: ignore[arg-type]  # name is a field
                    if sender.DESCRIPTOR.fields_by_name[name].has_presence
                    else getattr(sender, name)
                )
            ]
        if list(mask.paths) == ["*"]:
            return self._columns
        check_mask(
            mask.paths,
            self._columns,
            lambda path: UNCHANGEABLE.get(
                path, f"use {', '.join(self._columns)}, or * for all of them"
            ),
        )
        return dict.fromkeys(mask.paths)

    def columns_of(
        self, sender: sender_pb2.Sender, fields: Iterable[str] | None = None
    ) -> dict[str, Any]:
        """Check fields of a sender, by default all; return the values of their columns.

        Raises:
            InvalidInput: a field is wrong.
        """
        values: dict[str, Any] = {}
        wrong = Violations()
        for name in self._columns if fields is None else fields:
            with wrong:
                values.update(self._columns[name](sender))
        wrong.raise_any()
        return values

    def _email(self, sender: sender_pb2.Sender) -> _Columns:
        return {"email": self.address("sender.email", sender.email)}

    def address(self, field: str, text: str) -> str:
        """Return the normal form of an address.

        Raises:
            InvalidInput: ADDRESS_INVALID.
        """
        allowed = self._settings.special_domains == "allow"
        return senders.check_sender_address(field, text, special_domains=allowed)

    def _display_name(self, sender: sender_pb2.Sender) -> _Columns:
        name = bounds.DISPLAY_NAME.check("sender.display_name", sender.display_name)
        return {"display_name": name}

    def _smtp(self, sender: sender_pb2.Sender) -> _Columns:
        if not sender.HasField("smtp"):
            columns = ("host", "port", "security", "username", "password", "ca")
            return {f"smtp_{column}": None for column in columns} | {"oauth2": None}
        wrong = Violations()
        endpoint, provider = wrong.value(lambda: self._endpoint(sender.smtp), (None, None))
        oauth2 = None
        if sender.smtp.HasField("oauth2"):
            oauth2 = wrong.value(
                lambda: self._oauth2(sender.smtp.oauth2, endpoint, provider), dict[str, Any]()
            )
        wrong.raise_any()
        if endpoint is None:
            raise AssertionError("an error was lost")
        return {
            "smtp_host": endpoint.host,
            "smtp_port": endpoint.port,
            "smtp_security": endpoint.security,
            "smtp_username": endpoint.username or None,
            "smtp_password": self._encrypted(endpoint.password),
            "smtp_ca": endpoint.ca or None,
            "oauth2": oauth2,
        }

    def _endpoint(self, asked: sender_pb2.SmtpEndpoint) -> tuple[Endpoint, PresetProvider | None]:
        """Return the endpoint, and the provider of its preset.

        Raises:
            InvalidInput: SMTP_ENDPOINT_INVALID.
        """
        wrong = Violations()
        # In place of an invalid preset, another one fills in the fields that are not set. So only
        # errors in the given fields are reported.
        provider = wrong.value(
            lambda: provider_of("sender.smtp.preset", asked.preset), PROVIDERS[SmtpPreset.GMAIL]
        )
        host, port, security = complete_address(provider, asked.host, asked.port, asked.security)
        with wrong:
            endpoint = senders.check_endpoint(
                "sender.smtp",
                host,
                port,
                security=security,
                username=asked.username,
                password=asked.password,
                ca=asked.ca_certificates,
            )
            refusal = self._ports.refusal(endpoint.port)
            if refusal:
                raise InvalidInput.field(
                    "sender.smtp.port", refusal, reason="SMTP_ENDPOINT_INVALID"
                )
        wrong.raise_any()
        return endpoint, provider

    def _oauth2(
        self,
        asked: sender_pb2.OAuth2Credentials,
        endpoint: Endpoint | None,
        provider: PresetProvider | None,
    ) -> _Columns:
        given = OAuth2Credentials(
            asked.token_url,
            asked.client_id,
            asked.client_secret,
            asked.refresh_token,
            asked.scope,
            asked.tenant,
        )
        checked = check_credentials("sender.smtp", given, endpoint, provider)
        return {
            "token_url": checked.token_url,
            "client_id": checked.client_id,
            "scope": checked.scope,
            "client_secret": self._encrypted(checked.client_secret),
            "refresh_token": self._encrypted(checked.refresh_token),
        }

    def _encrypted(self, secret: str) -> bytes | None:
        return self._secrets.encrypt(secret) if secret else None

    def _hourly_limit(self, sender: sender_pb2.Sender) -> _Columns:
        limit = sender.hourly_limit if sender.HasField("hourly_limit") else None
        default = self._settings.default_hourly_limit
        return {"hourly_limit": senders.check_hourly_limit("sender.hourly_limit", limit, default)}

    def _min_gap(self, sender: sender_pb2.Sender) -> _Columns:
        gap = whole_ms(sender.min_gap, "sender.min_gap") if sender.HasField("min_gap") else None
        return {"min_gap_ms": senders.check_min_gap("sender.min_gap", gap, self._settings.min_gap)}

    def _max_in_flight(self, sender: sender_pb2.Sender) -> _Columns:
        most = sender.max_in_flight if sender.HasField("max_in_flight") else None
        return {"max_in_flight": senders.check_max_in_flight("sender.max_in_flight", most)}

    def _sending_hours(self, sender: sender_pb2.Sender) -> _Columns:
        if not sender.HasField("sending_hours"):
            return {"sending_hours": None}
        asked = sender.sending_hours
        hours = senders.check_sending_hours(
            "sender.sending_hours",
            asked.weekdays,
            asked.start,
            asked.end,
            asked.time_zone,
        )
        return {"sending_hours": hours.to_text()}


# What UpdateSender cannot change, and the methods that can.
UNCHANGEABLE: Final = {
    "state": "use PauseSender or ResumeSender",
    "user_id": "a sender stays with its user",
}
