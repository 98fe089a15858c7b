"""Which senders share an endpoint's state, and that the keys tell nothing about passwords."""

from __future__ import annotations

from typing import Any

import pytest

from outbox_server.shared.queue.circuit_keys import CircuitKeys, relay_key, user_key
from outbox_server.shared.secrets import SecretBox, generate_key

OLD, NEW = generate_key(), generate_key()
BOX = SecretBox([OLD])
ACCOUNT: dict[str, Any] = {
    "user_id": "victim",
    "host": "mail.test",
    "port": 587,
    "security": 3,
    "username": "anna",
    "password": "s3cret",
    "oauth2_credentials_id": None,
}


def key(box: SecretBox = BOX, *, override: bool = False, **changes: Any) -> str:
    values = ACCOUNT | changes
    password = values.pop("password")
    encrypted = None if password is None else box.encrypt(password)
    return CircuitKeys(box, override=override).of_sender(**values, password=encrypted)


def test_senders_of_one_user_with_the_same_account_and_password_have_one_key() -> None:
    assert key() == key()
    assert key(host="MAIL.test") == key()


@pytest.mark.parametrize(
    "change",
    [
        {"user_id": "eve"},
        {"host": "other.test"},
        {"port": 465},
        {"security": 2},
        {"username": "berta"},
        {"password": "wrong"},
        {"password": None},
        {"password": None, "oauth2_credentials_id": 7},
    ],
    ids=str,
)
def test_another_user_server_account_or_password_has_another_key(change: dict[str, Any]) -> None:
    assert key(**change) != key()


def test_oauth2_credentials_give_their_sender_a_key_of_its_own() -> None:
    keys = {key(password=None, oauth2_credentials_id=number) for number in (None, 1, 2)}
    assert len(keys) == 3


def test_the_parts_of_a_key_cannot_be_shifted() -> None:
    assert key(user_id="a", host="bc") != key(user_id="ab", host="c")


def test_a_key_cannot_be_computed_without_the_encryption_key() -> None:
    assert key(SecretBox([NEW])) != key()


def test_a_new_encryption_key_changes_no_key_before_the_old_one_is_removed() -> None:
    assert key(SecretBox([NEW, OLD])) == key()


def test_a_password_that_cannot_be_decrypted_still_gives_a_key() -> None:
    values = ACCOUNT | {"password": BOX.encrypt("s3cret")}
    found = CircuitKeys(SecretBox([NEW]), override=False).of_sender(**values)
    assert found not in (key(), key(SecretBox([NEW])))


def test_the_relay_has_a_key_for_each_user() -> None:
    assert key(host=None, port=None) == relay_key("victim")
    assert key(override=True) == relay_key("victim")
    assert relay_key("victim") != relay_key("eve")
    assert relay_key("victim") == f"relay:{user_key('victim')}"
