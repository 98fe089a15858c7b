"""The AUTH exchange of a session that authenticates with an access token."""

from __future__ import annotations

import base64

import aiosmtplib
import pytest

from outbox_server.shared.smtp.oauth2_auth import Login, is_token_refused

# The example of https://developers.google.com/workspace/gmail/imap/xoauth2-protocol.
GOOGLES = Login("someuser@example.com", "ya29.vF9dft4qmTc2Nvb3RlckBhdHRhdmlzdGEuY29tCg")
TOKEN = "ya29." + "".join(f"{number:03}" for number in range(100))


def test_xoauth2_has_the_format_that_google_documents() -> None:
    assert GOOGLES.xoauth2() == (
        "dXNlcj1zb21ldXNlckBleGFtcGxlLmNvbQFhdXRoPUJlYXJlciB5YTI5LnZGOWRmdDRxbVRjMk52YjNSbGNrQmhk"
        "SFJoZG1semRHRXVZMjl0Q2cBAQ=="
    )


def test_oauthbearer_has_the_format_of_rfc_7628() -> None:
    said = base64.b64decode(Login("user@example.com", "vF9dft4qmTc2").oauthbearer()).decode()
    assert said == "n,a=user@example.com,\x01auth=Bearer vF9dft4qmTc2\x01\x01"


def test_a_name_cannot_inject_a_field() -> None:
    said = base64.b64decode(Login("a=b,c@x.test", "t").oauthbearer()).decode()
    assert said.startswith("n,a=a=3Db=2Cc@x.test,\x01")


def test_a_non_ascii_name_is_sent_as_utf_8() -> None:
    said = base64.b64decode(Login("ä@x.test", "t").xoauth2()).decode()
    assert said.startswith("user=ä@x.test\x01")


@pytest.mark.parametrize(
    "quoted",
    [
        TOKEN,
        TOKEN[:40],
        TOKEN[100:150],
        Login("me@x.test", TOKEN).xoauth2(),
        Login("me@x.test", TOKEN).xoauth2()[:80],
        Login("me@x.test", TOKEN).oauthbearer()[-80:],
    ],
)
def test_a_token_is_hidden_in_every_form_and_in_parts(quoted: str) -> None:
    assert Login("me@x.test", TOKEN).hide(f"no: {quoted}.") == "no: [token]."


def test_a_login_shows_no_token() -> None:
    assert TOKEN not in repr(Login("me@x.test", TOKEN))


def test_only_invalid_credentials_request_another_token() -> None:
    assert is_token_refused(aiosmtplib.SMTPAuthenticationError(535, "5.7.8 no"))
    assert not is_token_refused(aiosmtplib.SMTPAuthenticationError(454, "4.7.0 later"))
    assert not is_token_refused(aiosmtplib.SMTPResponseException(535, "5.7.8 no"))
    assert not is_token_refused(OSError())
