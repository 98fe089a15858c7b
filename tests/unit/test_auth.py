from __future__ import annotations

import pytest

from shared.auth import (
    Caller,
    CallerKind,
    authenticator_for,
    current_caller,
    effective_user,
    is_loopback,
    require_user,
)
from shared.errors import ConfigurationError, InvalidInput, PermissionDenied, Unauthenticated
from shared.settings import load_settings

ANN = Caller(user_id="ann", kind=CallerKind.USER)
BACKEND = Caller(user_id=None, kind=CallerKind.SERVICE)
LOCAL = Caller(user_id=None, kind=CallerKind.LOCAL)


def test_a_user_acts_for_itself_whether_it_says_so_or_not() -> None:
    assert effective_user(ANN, "") == "ann"
    assert effective_user(ANN, "ann") == "ann"


def test_a_user_cannot_act_for_another() -> None:
    with pytest.raises(PermissionDenied) as caught:
        effective_user(ANN, "bob")
    assert caught.value.reason == "USER_MISMATCH"


@pytest.mark.parametrize("caller", [BACKEND, LOCAL, Caller(None, CallerKind.OPERATOR)])
def test_all_others_act_for_whom_they_name(caller: Caller) -> None:
    assert effective_user(caller, "bob") == "bob"
    assert effective_user(caller, "") is None
    with pytest.raises(InvalidInput) as caught:
        require_user(caller, "")
    assert caught.value.reason == "USER_ID_REQUIRED"


def test_outside_of_a_call_nobody_is_the_caller() -> None:
    with pytest.raises(Unauthenticated):
        current_caller()


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:1", "127.8.8.8:1", "[::1]:1", "localhost:1", "unix:/run/outbox"]
)
def test_only_this_machine_reaches_a_loopback_address(listen: str) -> None:
    assert is_loopback(listen)
    authenticator_for(load_settings(auth="off"), listen)


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "mail.example:1", "localhost.example:1", ":1"]
)
def test_auth_off_is_refused_beyond_loopback(listen: str) -> None:
    assert not is_loopback(listen)
    with pytest.raises(ConfigurationError, match="OUTBOX_AUTH=off") as caught:
        authenticator_for(load_settings(auth="off"), listen)
    assert "127.0.0.1" in caught.value.message


def test_keys_are_refused_until_they_are_served() -> None:
    with pytest.raises(ConfigurationError, match=r"OUTBOX_AUTH=keys.*OUTBOX_AUTH=off"):
        authenticator_for(load_settings(auth="keys"), "127.0.0.1:1")
