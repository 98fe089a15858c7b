"""The text shown of a server's reply never contains the password or a part of it."""

from __future__ import annotations

from base64 import b64encode

import pytest

from outbox_server.shared.smtp.endpoint import Endpoint
from outbox_server.shared.states import SmtpSecurity

PASSWORD = "a long secret: 0123456789"
ENDPOINT = Endpoint("mail.test", 587, SmtpSecurity.TLS, "shop@example.test", PASSWORD)
PLAIN = b64encode(f"\0shop@example.test\0{PASSWORD}".encode()).decode()
LOGIN = b64encode(PASSWORD.encode()).decode()


@pytest.mark.parametrize("said", [PASSWORD, PLAIN, LOGIN])
@pytest.mark.parametrize("kept", [1.0, 0.9, 0.7])
def test_a_password_that_a_server_quotes_in_part_is_hidden(said: str, kept: float) -> None:
    quoted = said[: int(len(said) * kept)]
    shown = ENDPOINT.shown(f"500 line too long: {quoted}")
    assert shown.startswith("500 line too long: [password]")
    assert not any(quoted[at : at + 12] in shown for at in range(len(quoted) - 11))


def test_any_other_reply_is_shown_unchanged() -> None:
    assert ENDPOINT.shown("550 5.1.1 no such user: x@y.test") == "550 5.1.1 no such user: x@y.test"
