from __future__ import annotations

import pytest

from outbox_server.shared.errors import ConfigurationError, FailedPrecondition
from outbox_server.shared.secrets import SecretBox, generate_key
from outbox_server.shared.settings import load_settings


def test_an_encrypted_password_decrypts_and_is_not_readable_at_rest() -> None:
    box = SecretBox([generate_key()])
    token = box.encrypt("pässword")
    assert box.decrypt(token) == "pässword"
    assert "pässword".encode() not in token


def test_old_keys_decrypt_and_the_newest_key_encrypts() -> None:
    old, new = generate_key(), generate_key()
    token = SecretBox([old]).encrypt("p")
    both = SecretBox.from_settings(load_settings(encryption_keys=f" {new}, {old},"))
    assert both.decrypt(token) == "p"
    assert SecretBox([new]).decrypt(both.encrypt("q")) == "q"


def test_without_a_key_encryption_fails_and_the_error_says_what_to_do() -> None:
    box = SecretBox.from_settings(load_settings(encryption_keys=""))
    with pytest.raises(FailedPrecondition) as caught:
        box.encrypt("p")
    assert caught.value.reason == "ENCRYPTION_NOT_CONFIGURED"
    assert "OUTBOX_ENCRYPTION_KEYS" in caught.value.message
    assert "outbox keys generate-encryption-key" in caught.value.message


def test_decrypting_with_a_lost_key_is_a_clear_error() -> None:
    token = SecretBox([generate_key()]).encrypt("p")
    with pytest.raises(FailedPrecondition) as caught:
        SecretBox([generate_key()]).decrypt(token)
    assert caught.value.reason == "DECRYPTION_FAILED"


@pytest.mark.parametrize("bad", ["abc", "not a key", "\u2713", "A" * 43])
def test_a_malformed_key_prevents_the_start_and_is_not_shown(bad: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        SecretBox.from_settings(load_settings(encryption_keys=f"{generate_key()},{bad}"))
    assert "OUTBOX_ENCRYPTION_KEYS: key 2 is not a Fernet key" in caught.value.message
    assert bad not in caught.value.message
