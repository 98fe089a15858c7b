from __future__ import annotations

import pytest

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.states import DuplicatePolicy, SmtpSecurity, enum_or_none, requested_enum


def test_a_number_becomes_its_enum_member() -> None:
    assert enum_or_none(SmtpSecurity, 2) is SmtpSecurity.STARTTLS
    assert requested_enum(SmtpSecurity, 2, "smtp.security") is SmtpSecurity.STARTTLS


def test_an_unset_value_becomes_none() -> None:
    assert enum_or_none(SmtpSecurity, None) is None
    assert enum_or_none(SmtpSecurity, 0) is None
    assert requested_enum(SmtpSecurity, 0, "smtp.security") is None


def test_an_unknown_stored_number_is_an_internal_error() -> None:
    with pytest.raises(ValueError, match="7 is not a valid SmtpSecurity"):
        enum_or_none(SmtpSecurity, 7)


def test_an_unknown_requested_number_is_refused_with_the_allowed_members() -> None:
    with pytest.raises(InvalidInput) as caught:
        requested_enum(SmtpSecurity, 7, "smtp.security", reason="SMTP_ENDPOINT_INVALID")
    assert caught.value.message == "smtp.security: must be NONE, STARTTLS or TLS (got 7)"
    assert caught.value.reason == "SMTP_ENDPOINT_INVALID"
    with pytest.raises(InvalidInput, match="must be KEEP_FIRST or KEEP_ALL"):
        requested_enum(DuplicatePolicy, -1, "options.duplicates")
