"""Presets and the checks of OAuth 2.0 credentials."""

from __future__ import annotations

from typing import Any

import pytest
from outbox.v1 import sender_pb2

from outbox_server.services.scheduler.oauth2_credentials import OAuth2Credentials, check_credentials
from outbox_server.services.scheduler.smtp_presets import (
    PROVIDERS,
    SmtpPreset,
    complete_address,
    provider_of,
)
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.smtp.endpoint import Endpoint
from outbox_server.shared.states import SmtpSecurity

GMAIL, MICROSOFT365 = PROVIDERS[SmtpPreset.GMAIL], PROVIDERS[SmtpPreset.MICROSOFT365]
ENDPOINT = Endpoint("smtp.example.com", 587, SmtpSecurity.STARTTLS, "me@example.com")
URL = "https://id.example.com/token"


def credentials(**fields: str) -> OAuth2Credentials:
    given: dict[str, Any] = {
        "token_url": "",
        "client_id": "id",
        "client_secret": "",
        "refresh_token": "",
        "scope": "",
        **fields,
    }
    return OAuth2Credentials(**given)


def refused_field(
    asked: OAuth2Credentials, endpoint: Endpoint = ENDPOINT, preset: Any = None
) -> str:
    with pytest.raises(InvalidInput) as caught:
        check_credentials("smtp", asked, endpoint, preset)
    assert caught.value.reason == "SMTP_ENDPOINT_INVALID"
    (violation,) = caught.value.violations
    return violation.field


def test_the_presets_are_those_of_the_proto() -> None:
    known = dict(sender_pb2.SmtpPreset.items())
    del known["SMTP_PRESET_UNSPECIFIED"]
    assert known == {f"SMTP_PRESET_{preset.name}": preset.value for preset in SmtpPreset}
    assert set(PROVIDERS) == set(SmtpPreset)


def test_without_a_preset_no_field_is_filled() -> None:
    assert provider_of("smtp.preset", 0) is None
    assert complete_address(None, "", 0, 0) == ("", 0, 0)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(
        InvalidInput, match=r"must be SMTP_PRESET_GMAIL or SMTP_PRESET_MICROSOFT365 \(got 99\)"
    ):
        provider_of("smtp.preset", 99)


@pytest.mark.parametrize(
    ("preset", "host"),
    [(SmtpPreset.GMAIL, "smtp.gmail.com"), (SmtpPreset.MICROSOFT365, "smtp.office365.com")],
)
def test_a_preset_fills_the_address(preset: SmtpPreset, host: str) -> None:
    provider = provider_of("smtp.preset", preset)
    assert complete_address(provider, "", 0, 0) == (host, 587, SmtpSecurity.STARTTLS)


def test_a_preset_does_not_replace_given_values() -> None:
    assert complete_address(GMAIL, "relay.example.com", 0, 0)[0] == "relay.example.com"
    # Port 465 uses TLS from the first byte and no other port does. The endpoint's rules fill in the
    # rest.
    assert complete_address(GMAIL, "", 465, 0) == ("smtp.gmail.com", 465, 0)
    assert complete_address(GMAIL, "", 0, 3) == ("smtp.gmail.com", 0, 3)


def test_gmail_fills_token_url_and_scope() -> None:
    checked = check_credentials("smtp", credentials(refresh_token="r"), ENDPOINT, GMAIL)
    assert checked.token_url == "https://oauth2.googleapis.com/token"
    assert checked.scope == "https://mail.google.com/"


def test_microsoft_fills_the_tenant_and_the_scope_of_the_grant() -> None:
    by_refresh = check_credentials("smtp", credentials(refresh_token="r"), ENDPOINT, MICROSOFT365)
    assert by_refresh.token_url == "https://login.microsoftonline.com/common/oauth2/v2.0/token"
    assert by_refresh.scope == "https://outlook.office.com/SMTP.Send offline_access"
    asked = credentials(client_secret="s", tenant="example.onmicrosoft.com")
    by_client = check_credentials("smtp", asked, ENDPOINT, MICROSOFT365)
    assert by_client.token_url == (
        "https://login.microsoftonline.com/example.onmicrosoft.com/oauth2/v2.0/token"
    )
    assert by_client.scope == "https://outlook.office365.com/.default"


def test_given_credentials_are_not_replaced() -> None:
    asked = credentials(refresh_token="r", token_url=URL, scope="mail")
    for provider in (GMAIL, MICROSOFT365, None):
        checked = check_credentials("smtp", asked, ENDPOINT, provider)
        assert (checked.token_url, checked.scope) == (URL, "mail")


def test_without_a_preset_no_scope_is_requested() -> None:
    asked = credentials(refresh_token="r", token_url=URL)
    assert check_credentials("smtp", asked, ENDPOINT, None).scope == ""


@pytest.mark.parametrize(
    ("fields", "provider", "field"),
    [
        ({"client_id": "", "refresh_token": "r"}, GMAIL, "client_id"),
        ({"client_id": "i" * 513, "refresh_token": "r"}, GMAIL, "client_id"),
        ({"client_id": "i\n", "refresh_token": "r"}, GMAIL, "client_id"),
        ({"refresh_token": "r" * 8_193}, GMAIL, "refresh_token"),
        ({"refresh_token": "r\0"}, GMAIL, "refresh_token"),
        ({"client_secret": "s" * 1_025}, MICROSOFT365, "client_secret"),
        ({"refresh_token": "r", "scope": "s" * 1_025}, GMAIL, "scope"),
        ({"client_secret": "s"}, GMAIL, "refresh_token"),
        ({"client_secret": "s"}, MICROSOFT365, "tenant"),
        ({"client_secret": "s", "tenant": "Common"}, MICROSOFT365, "tenant"),
        ({"client_secret": "s", "tenant": "organizations"}, MICROSOFT365, "tenant"),
        ({"refresh_token": "r", "tenant": "a/../b"}, MICROSOFT365, "tenant"),
        ({"refresh_token": "r", "tenant": "a?b"}, MICROSOFT365, "tenant"),
        ({"refresh_token": "r", "tenant": "x" * 300}, MICROSOFT365, "tenant"),
        ({"refresh_token": "r", "tenant": "t"}, GMAIL, "tenant"),
        ({"refresh_token": "r", "tenant": "t"}, None, "tenant"),
        ({"refresh_token": "r", "tenant": "t", "token_url": URL}, MICROSOFT365, "tenant"),
        ({"refresh_token": "r"}, None, "token_url"),
    ],
)
def test_wrong_credentials_name_their_field(
    fields: dict[str, str], provider: Any, field: str
) -> None:
    assert refused_field(credentials(**fields), preset=provider) == f"smtp.oauth2.{field}"


def test_credentials_need_a_secret() -> None:
    assert refused_field(credentials(), preset=GMAIL) == "smtp.oauth2"


@pytest.mark.parametrize(
    "url",
    [
        "http://id.example.com/token",
        "ftp://id.example.com/token",
        "id.example.com/token",
        "https://",
        "https:///token",
        "https://id.example.com:0/token",
        "https://id.example.com:99999/token",
        "https://id.example.com:x/token",
        "https://user:word@id.example.com/token",
        "https://id.example.com\\@evil.example/token",
        "https://id.example.com/token#part",
        "https://id.example.com/to ken",
        "https://id.example.com/to\tken",
        "https://id.exämple.com/token",
        "https://[::1/token",
        "https://id..example.com/token",
        "https://id.example.com/" + "t" * 2_048,
    ],
)
def test_a_token_url_that_is_not_https_is_refused(url: str) -> None:
    asked = credentials(refresh_token="r", token_url=url)
    assert refused_field(asked) == "smtp.oauth2.token_url"


@pytest.mark.parametrize(
    "url", [URL, "https://id.example.com:8443/a/b?c=d", "https://192.0.2.1/t", "https://[::1]/t"]
)
def test_a_token_url_may_have_port_path_and_query(url: str) -> None:
    asked = credentials(refresh_token="r", token_url=url)
    assert check_credentials("smtp", asked, ENDPOINT, None).token_url == url


def test_an_endpoint_for_oauth2_has_a_mailbox_tls_and_no_password() -> None:
    asked = credentials(refresh_token="r")
    host, port = ENDPOINT.host, ENDPOINT.port
    plain = Endpoint(host, port, SmtpSecurity.NONE, "me")
    assert refused_field(asked, plain, GMAIL) == "smtp.security"
    nobody = Endpoint(host, port, SmtpSecurity.TLS)
    assert refused_field(asked, nobody, GMAIL) == "smtp.username"
    both = Endpoint(host, port, SmtpSecurity.TLS, "me", "word")
    assert refused_field(asked, both, GMAIL) == "smtp.oauth2"


def test_secrets_are_not_in_the_representation() -> None:
    shown = repr(credentials(client_secret="hidden-one", refresh_token="hidden-two"))
    assert "hidden" not in shown
