from __future__ import annotations

import re

import pytest
from outbox.v1 import batch_pb2, email_job_pb2, sender_pb2

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.states import (
    BatchMode,
    DuplicatePolicy,
    JobState,
    SenderState,
    SmtpSecurity,
    enum_or_none,
    requested_enum,
    requested_states,
)


def test_a_number_becomes_its_enum_member() -> None:
    assert enum_or_none(SmtpSecurity, 2) is SmtpSecurity.STARTTLS
    assert requested_enum(SmtpSecurity, 2, "smtp.security") is SmtpSecurity.STARTTLS


def test_an_error_names_the_values_as_the_contract_does() -> None:
    for kind, number, values in (
        (JobState, 99, email_job_pb2.EmailJobState),
        (SenderState, -1, sender_pb2.SenderState),
        (SmtpSecurity, 99, sender_pb2.SmtpSecurity),
        (BatchMode, 99, batch_pb2.BatchMode),
        (DuplicatePolicy, 99, batch_pb2.DuplicatePolicy),
    ):
        with pytest.raises(InvalidInput) as caught:
            requested_enum(kind, number, "f")
        named = set(re.findall(r"[A-Z_]{2,}", caught.value.message))
        assert named == {name for name, value in values.items() if value}, kind


def test_all_wrong_states_of_a_list_are_named() -> None:
    assert requested_states([3, 0, 4], "states") == {JobState.SENT, JobState.FAILED}
    with pytest.raises(InvalidInput) as caught:
        requested_states([99, 3, -1], "states")
    assert [wrong.field for wrong in caught.value.violations] == ["states[0]", "states[2]"]


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
    assert caught.value.message == (
        "smtp.security: must be SMTP_SECURITY_NONE, SMTP_SECURITY_STARTTLS or SMTP_SECURITY_TLS "
        "(got 7)"
    )
    assert caught.value.reason == "SMTP_ENDPOINT_INVALID"
    with pytest.raises(InvalidInput, match="must be DUPLICATE_POLICY_KEEP_FIRST or DUPLICATE"):
        requested_enum(DuplicatePolicy, -1, "options.duplicates")
