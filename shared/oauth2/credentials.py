"""A reference to stored OAuth 2.0 credentials, and the interface that gives access tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

# Seconds that a session may wait for a token. Another process may be requesting one.
WAIT_LIMIT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class OAuth2Ref:
    """Refers to stored credentials (`oauth2_credentials.id`). Contains no secret.

    Credentials that replace others have a new id, so a connection that was opened with the old
    ones is not used for the new ones.
    """

    credentials_id: int


class TokenRefused(Exception):
    """The provider refuses an access token until somebody acts. The sender cools down.

    The text is for people and contains no secret.
    """


class TokenUnavailable(OSError):
    """There is no access token now; a later try may succeed. The text contains no secret."""


class TokenProvider(Protocol):
    """Gives access tokens to sessions."""

    async def token(self, ref: OAuth2Ref, *, refused: str | None = None) -> str:
        """Return a valid access token, other than `refused`, which a mail server did not accept.

        Raises:
            TokenRefused: the provider refuses an access token.
            TokenUnavailable: there is no usable answer.
        """
        ...


class _NoTokens:
    async def token(self, ref: OAuth2Ref, *, refused: str | None = None) -> str:
        del refused
        raise TokenUnavailable(f"this process requests no access tokens (credentials {ref})")


# Used by code that opens sessions only to endpoints without OAuth 2.0.
NO_TOKENS: Final[TokenProvider] = _NoTokens()
