"""A sender's cooldown as PostgreSQL stores it, and its description for people. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from outbox_server.shared.smtp.reply_text import describe_reply


@dataclass(frozen=True, slots=True)
class CooldownRecord:
    """A sender's cooldown: when and why the account was refused, and when the next probe may begin.

    `smtp_code`, `enhanced_code` and `message` are the reply of the last refusal. If `smtp_code` is
    None, an OAuth 2.0 provider refused an access token. `refusals` counts the first refusal and the
    refused probes.
    """

    since: datetime
    next_probe_at: datetime
    refusals: int
    message: str
    smtp_code: int | None = None
    enhanced_code: str | None = None

    @property
    def reply(self) -> str:
        """The last refusal as one line, such as `550 5.4.5 Daily user sending limit exceeded`."""
        return describe_reply(self.smtp_code, self.enhanced_code, self.message)

    @property
    def refusal(self) -> str:
        """The cause as a sentence without its full stop."""
        since = f"{self.since.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        if self.smtp_code is None:
            return f"The sender has had no access token since {since} ({self.reply})"
        return f"The mail server has refused the sender's account since {since} ({self.reply})"

    def describe(self, now: datetime) -> str:
        """Return the cause and the time of the next probe in one sentence."""
        if self.next_probe_at <= now:
            return f"{self.refusal}; the next probe is sent when the sender's limits allow it."
        probe = f"{self.next_probe_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        return f"{self.refusal}; the next probe is at {probe}."
