"""The server side of AUTH: PLAIN, LOGIN, XOAUTH2 and OAUTHBEARER."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

# Sends a challenge, and returns what the client responds, both without base64.
Ask = Callable[[bytes], Awaitable[bytes]]


@dataclass
class Account:
    """One account of a provider. Both may be changed while the server runs."""

    password: str = field(default="", repr=False)
    # Access tokens that are valid now.
    tokens: set[str] = field(default_factory=set, repr=False)


class AuthCancelledError(Exception):
    """The client has cancelled the exchange with `*`."""


class BadResponseError(Exception):
    """The client's response is not base64, or not of the mechanism's form."""


def decode(text: bytes) -> bytes:
    """Decode a line of base64. `=` is the empty response.

    Raises:
        AuthCancelledError: the line is `*`.
        BadResponseError: the line is not base64.
    """
    if text == b"*":
        raise AuthCancelledError
    if text == b"=":
        return b""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise BadResponseError from None


async def authenticate(
    mechanism: str, initial: bytes | None, ask: Ask, accounts: Mapping[str, Account] | None
) -> str | None:
    """Return the account that signed in; None if user name or secret is wrong.

    If `accounts` is None, any name and any secret are accepted.

    Raises:
        AuthCancelledError: the client cancelled the exchange.
        BadResponseError: a response cannot be decoded.
    """
    if mechanism == "LOGIN":
        name = initial if initial is not None else await ask(b"Username:")
        user, secret = _text(name), _text(await ask(b"Password:"))
        return user if _has_password(accounts, user, secret) else None
    response = initial if initial is not None else await ask(b"")
    if mechanism == "PLAIN":
        # RFC 4616: authzid, authcid, password
        match _text(response).split("\0"):
            case [_, user, secret]:
                return user if _has_password(accounts, user, secret) else None
        raise BadResponseError
    user, token = _bearer(mechanism, _text(response))
    if accounts is None or _has_token(accounts, user, token):
        return user
    # RFC 7628, 3.2.2: the error goes out as a challenge, and the client has to respond to it.
    error = {"status": "400", "schemes": "Bearer", "scope": "https://mail.google.com/"}
    if mechanism == "OAUTHBEARER":
        error["status"] = "invalid_token"
    await ask(json.dumps(error).encode())
    return None


def _text(response: bytes) -> str:
    try:
        return response.decode()
    except UnicodeDecodeError:
        raise BadResponseError from None


def _bearer(mechanism: str, response: str) -> tuple[str, str]:
    """Return user name and token of an initial response.

    XOAUTH2 is `user=NAME^Aauth=Bearer TOKEN^A^A`. OAUTHBEARER is
    `n,a=NAME,^Ahost=...^Aauth=Bearer TOKEN^A^A`.
    """
    header, *pairs = response.split("\x01")
    if mechanism == "XOAUTH2":
        user = header.removeprefix("user=")
        found = header.startswith("user=")
    else:
        fields = header.split(",")
        user = next((one[2:] for one in fields if one.startswith("a=")), "")
        found = fields[0] in ("n", "y")
    auth = next((pair for pair in pairs if pair.lower().startswith("auth=bearer ")), None)
    if not found or auth is None:
        raise BadResponseError
    return user, auth.partition(" ")[2]


def _has_password(accounts: Mapping[str, Account] | None, user: str, password: str) -> bool:
    if accounts is None:
        return True
    account = accounts.get(user)
    return (
        account is not None
        and bool(account.password)
        and hmac.compare_digest(account.password.encode(), password.encode())
    )


def _has_token(accounts: Mapping[str, Account], user: str, token: str) -> bool:
    account = accounts.get(user)
    return account is not None and token in account.tokens
