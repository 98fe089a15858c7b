"""SMTP AUTH with an access token: XOAUTH2 and OAUTHBEARER (RFC 7628), over aiosmtplib."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass, field
from typing import Final

import aiosmtplib
from aiosmtplib.errors import SMTPAuthenticationError, SMTPException, SMTPResponseException

from outbox_server.shared.oauth2.credentials import OAuth2Ref, TokenProvider
from outbox_server.shared.redaction import redact
from outbox_server.shared.smtp.replies import asks_for_other_token

_CONTINUE: Final = 334
_SUCCESS: Final = 235


@dataclass(frozen=True, slots=True)
class Login:
    """A mailbox and an access token for it, as a session presents them."""

    username: str
    token: str = field(repr=False)
    # The token itself, and the token as each mechanism sends it. Replies are searched for them.
    _forms: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compute the forms once."""
        forms = (self.token, self.xoauth2(), self.oauthbearer())
        object.__setattr__(self, "_forms", forms)

    def xoauth2(self) -> str:
        """Return the initial response of XOAUTH2, in base64."""
        return _base64(f"user={self.username}\x01auth=Bearer {self.token}\x01\x01")

    def oauthbearer(self) -> str:
        """Return the initial response of OAUTHBEARER (RFC 7628, section 3.1), in base64."""
        # RFC 5801, section 4: both characters separate fields.
        name = self.username.replace("=", "=3D").replace(",", "=2C")
        return _base64(f"n,a={name},\x01auth=Bearer {self.token}\x01\x01")

    def hide(self, text: str) -> str:
        """Return the text with every form of the token hidden. A server may quote what we sent."""
        return redact(text, self._forms, "[token]")


async def login_for(
    tokens: TokenProvider, ref: OAuth2Ref, username: str, refused: Login | None = None
) -> Login:
    """Return the login of a session to an endpoint with these credentials.

    `refused` is the login that the server has just refused. The result has another token.

    Raises:
        TokenRefused: the provider refuses an access token.
        TokenUnavailable: there is no access token now.
    """
    token = await tokens.token(ref, refused=None if refused is None else refused.token)
    return Login(username, token)


async def authenticate(client: aiosmtplib.SMTP, login: Login) -> None:
    """Sign in to a session after EHLO.

    XOAUTH2 is used where the server offers it, because Google and Microsoft document it. Each reply
    has the time limit of the client. No error quotes the token.

    Raises:
        SMTPAuthenticationError: the server refuses the token.
        SMTPException: the server offers neither mechanism.
        OSError: the connection ended, or a reply took too long.
    """
    offered = {method.lower() for method in client.server_auth_methods}
    if "xoauth2" in offered:
        command, dummy = f"XOAUTH2 {login.xoauth2()}", b""
    elif "oauthbearer" in offered:
        # RFC 7628, section 3.2.3: the answer to an error is one byte 0x01.
        command, dummy = f"OAUTHBEARER {login.oauthbearer()}", _base64("\x01").encode()
    else:
        raise SMTPException("the server offers neither AUTH XOAUTH2 nor AUTH OAUTHBEARER")
    try:
        reply = await client.execute_command(b"AUTH", command.encode())
        if reply.code == _CONTINUE:
            # The challenge holds the reason as JSON. The refusal itself comes after our response.
            reply = await client.execute_command(dummy)
    except SMTPResponseException as error:
        raise type(error)(error.code, login.hide(error.message)) from None
    if reply.code != _SUCCESS:
        raise SMTPAuthenticationError(reply.code, login.hide(reply.message))


def is_token_refused(error: BaseException) -> bool:
    """Return whether the server refused the access token, so that another one may be accepted."""
    return isinstance(error, SMTPAuthenticationError) and asks_for_other_token(error.code)


def _base64(text: str) -> str:
    return b64encode(text.encode()).decode()
