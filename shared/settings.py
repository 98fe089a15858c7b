"""The typed settings: every `OUTBOX_*` variable with its default and its bounds.

No other code reads the environment. An instance is frozen, and constructors pass it down.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal, cast

from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from outbox_server.shared.bounds import MAX_GAP, MAX_HOURLY_LIMIT, MAX_QUOTA
from outbox_server.shared.durations import format_duration
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.secret_files import SecretFiles
from outbox_server.shared.setting_types import (
    DatabaseUrl,
    Duration,
    Durations,
    RedisUrl,
    Retention,
    Waits,
)

_ZERO = timedelta(0)
_MILLISECOND = timedelta(milliseconds=1)


class Settings(BaseSettings):
    """The settings of the operator. Durations are written as `250ms`, `2s`, `1h`."""

    # `.env` is not read: whoever can write to the current folder could redirect calls and read the
    # API key.
    model_config = SettingsConfigDict(env_prefix="OUTBOX_", extra="ignore", frozen=True)

    database_url: DatabaseUrl = Field(
        "postgresql://outbox@127.0.0.1:5432/outbox",
        description="PostgreSQL 14 or later: postgresql://user:password@host:port/database",
    )
    database_pool: int = Field(10, ge=2, le=200, description="connections of one process")
    redis_url: RedisUrl = Field(
        "redis://127.0.0.1:6379/0", description="Redis 6.2+ or Valkey 7.2+: redis://host:port/0"
    )
    shards: int = Field(
        1, ge=1, le=4096, description="shards of the queue; the same for every process"
    )
    scheduler_listen: str = Field("127.0.0.1:50051", description="host:port of the scheduler")
    dispatcher_listen: str = Field("127.0.0.1:50052", description="host:port of the dispatcher")
    stats_listen: str = Field("127.0.0.1:50053", description="host:port of the stats service")
    health_listen: str = Field(
        "",
        description="host:port where a service answers health checks without TLS; unset: only at "
        "its own port",
    )
    connections: int = Field(
        4_000,
        ge=1,
        le=60_000,
        description="connections to one server at a time; fewer if the limit of open files is low",
    )
    connections_per_peer: int = Field(
        256,
        ge=1,
        le=60_000,
        description="connections of one address (IPv6: one /64) to one server at a time",
    )
    auth: Literal["keys", "off"] = Field(
        "keys",
        description="how callers authenticate: `keys` (API keys), or `off`, which only a server "
        "that listens on loopback accepts",
    )
    plaintext: bool = Field(
        False,
        description="permits API keys and the relay's password to cross a network without TLS; use "
        "it only if a proxy or mesh encrypts",
    )
    api_key: SecretStr = Field(
        SecretStr(""), description="API key of the command line client, or use `--api-key-file`"
    )
    tls_certificate: str = Field("", description="PEM file of the servers' certificate chain")
    tls_key: str = Field("", description="PEM file of the servers' private key")
    tls_client_ca: str = Field(
        "", description="PEM file of a CA: servers accept only clients with its certificates"
    )
    tls_ca: str = Field(
        "",
        description="clients use TLS and trust this CA: a PEM file, or `system` for the machine's "
        "CAs",
    )
    tls_client_certificate: str = Field(
        "", description="PEM file of the client's certificate chain, if servers require one"
    )
    tls_client_key: str = Field("", description="PEM file of the client's private key")
    smtp_url: str = Field(
        "smtp://127.0.0.1:1025",
        description="relay of senders without their own: smtp://[user:password@]host:port, "
        "smtps:// for TLS from the start, smtp+starttls:// for STARTTLS",
    )
    smtp_override: bool = Field(
        False, description="send all mail to OUTBOX_SMTP_URL, even of senders with their own relay"
    )
    smtp_allow: str = Field(
        "",
        description="networks and hosts of the operator that senders may use as their own relay: "
        "10.1.0.0/16,mail.internal",
    )
    smtp_ports: str = Field(
        "25,465,587,2525",
        description="ports that senders' own relays may have, or `any`",
    )
    smtp_timeout: Duration | None = Field(
        None,
        gt=_ZERO,
        description="one limit for every phase of an SMTP session, in place of those below; below "
        "10m, mail may be sent twice if a server replies late",
    )
    smtp_connect_timeout: Duration = Field(
        timedelta(seconds=30),
        gt=_ZERO,
        description="limit of a TCP connect and of a TLS handshake",
    )
    smtp_greeting_timeout: Duration = Field(
        timedelta(minutes=5), gt=_ZERO, description="limit of the wait for a server's greeting"
    )
    smtp_ehlo_timeout: Duration = Field(
        timedelta(minutes=5), gt=_ZERO, description="limit of each reply to EHLO, STARTTLS and AUTH"
    )
    smtp_mail_timeout: Duration = Field(
        timedelta(minutes=5), gt=_ZERO, description="limit of the reply to MAIL"
    )
    smtp_rcpt_timeout: Duration = Field(
        timedelta(minutes=5), gt=_ZERO, description="limit of the reply to RCPT"
    )
    smtp_data_timeout: Duration = Field(
        timedelta(minutes=2), gt=_ZERO, description="limit of the reply to DATA"
    )
    smtp_block_timeout: Duration = Field(
        timedelta(minutes=3),
        gt=_ZERO,
        description="longest time in which a server accepts no more bytes of a body",
    )
    smtp_end_timeout: Duration = Field(
        timedelta(minutes=10), gt=_ZERO, description="limit of the reply to a body"
    )
    smtp_helo: str = Field(
        "",
        max_length=255,
        description="name sent in EHLO; unset: the host's name if it has a dot, else its address "
        "in brackets",
    )
    smtp_mails_per_connection: int = Field(
        100, ge=1, le=1_000_000, description="mails after which a connection is ended"
    )
    smtp_connection_age: Duration = Field(
        timedelta(minutes=10), gt=_ZERO, description="age at which a connection is ended"
    )
    smtp_ca: str = Field(
        "",
        description="PEM file of a private CA that may sign mail servers' certificates, in "
        "addition to the machine's CAs",
    )
    reply_rules: str = Field(
        "",
        description="TOML file of rules for SMTP replies, which extend or replace built-in rules",
    )
    cooldown: Waits = Field(
        (timedelta(minutes=5), timedelta(minutes=15), timedelta(hours=1)),
        description="waits before the first, second, ... probe of a sender whose account was "
        "refused; the last repeats",
    )
    quota_day: Duration = Field(
        timedelta(hours=24),
        gt=_ZERO,
        le=timedelta(days=7),
        description="how far back a mail server's daily quota counts; shorter only in tests",
    )
    refusals_in_a_row: int = Field(
        10,
        ge=0,
        le=1000,
        description="number of permanent refusals in a row, by replies that no rule knows, after "
        "which a sender cools down; 0 means never",
    )
    defer_backoff: Waits = Field(
        (
            timedelta(minutes=5),
            timedelta(minutes=10),
            timedelta(minutes=20),
            timedelta(minutes=40),
            timedelta(hours=1),
        ),
        description="waits between attempts of a mail that its server defers (greylisting, full "
        "mailbox); the last repeats",
    )
    defer_for: Duration = Field(
        timedelta(hours=24),
        gt=_ZERO,
        le=timedelta(days=30),
        description="how long a deferred mail is tried, unless its expire_after ends earlier",
    )
    smtp_pool: int = Field(20, ge=1, le=1000, description="connections of one process to a relay")
    smtp_idle: Duration = Field(
        timedelta(seconds=30), gt=_ZERO, description="a kept connection idle for longer is closed"
    )
    dispatcher_concurrency: int = Field(
        5, ge=1, le=1000, description="sends in flight in one dispatcher"
    )
    default_hourly_limit: int = Field(
        200, ge=1, le=1_000_000, description="hourly_limit of senders that do not set it"
    )
    rate_window: Duration = Field(
        timedelta(hours=1),
        ge=_MILLISECOND,
        le=timedelta(days=7),
        description="the trailing window of hourly_limit; shorter only in tests",
    )
    min_gap: Duration = Field(
        timedelta(seconds=2),
        ge=_ZERO,
        le=timedelta(days=1),
        description="minimum gap of every sender",
    )
    retry_backoff: Durations = Field(
        (timedelta(seconds=5), timedelta(seconds=25), timedelta(seconds=125)),
        description="waits before the second, third, ... attempt, in any number; "
        "also before the probes of an open circuit",
    )
    lease: Duration = Field(
        timedelta(seconds=60),
        ge=timedelta(milliseconds=100),
        le=timedelta(hours=1),
        description="how long a dispatcher holds a job",
    )
    hold_after: Duration = Field(
        timedelta(minutes=5),
        gt=_ZERO,
        le=timedelta(days=30),
        description="how much PostgreSQL may lose in a failover; if it lost more, as after a "
        "restore, nothing that waits is sent until an operator releases it",
    )
    uncertain_policy: Literal["resend", "hold"] = Field(
        "resend",
        description="what happens to a mail if nobody can know whether the server accepted it: "
        "`resend`, or `hold` until a caller decides",
    )
    retention: Retention = Field(
        None,
        description="age at which finished jobs are removed, with their attempts and batches, such "
        "as `90d`; at least 1d, OUTBOX_RATE_WINDOW and OUTBOX_QUOTA_DAY; unset or 0: never",
    )
    audit_retention: Retention = Field(
        timedelta(days=365),
        description="age at which events of the audit log are removed, such as `90d`; 0: never",
    )
    event_retention: Duration = Field(
        timedelta(days=7),
        ge=timedelta(hours=1),
        le=timedelta(days=90),
        description="how long WatchEmailJobs can go back: older events of jobs are removed, such "
        "as `7d`; 1h to 90d",
    )
    webhook_allow: str = Field(
        "",
        description="networks and hosts of the operator that webhooks may reach, also by http and "
        "at any port: 10.1.0.0/16,hooks.internal",
    )
    webhook_backoff: Waits = Field(
        tuple(
            timedelta(seconds=seconds)
            for seconds in (5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
        ),
        description="waits before a webhook's failed request is tried again; after the last try it "
        "is given up",
    )
    user_waiting_jobs: int = Field(
        10_000_000, ge=0, le=MAX_QUOTA, description="maximum waiting jobs of one user"
    )
    user_senders: int = Field(10_000, ge=0, le=MAX_QUOTA, description="maximum senders of one user")
    user_calls: int = Field(
        1_000,
        ge=0,
        le=MAX_QUOTA,
        description="maximum calls in flight of one user in one process, waiting ones included",
    )
    user_uploads: int = Field(
        100,
        ge=0,
        le=MAX_QUOTA,
        description="maximum uploads in flight of one user in one process, waiting ones included",
    )
    user_watches: int = Field(
        1_000, ge=0, le=MAX_QUOTA, description="maximum open watches of one user in one process"
    )
    user_stored_rejections: int = Field(
        1_000_000,
        ge=0,
        le=MAX_QUOTA,
        description="maximum stored rejections of one user; further ones are counted, not stored",
    )
    user_unproven_endpoints: int | None = Field(
        None,
        ge=1,
        le=MAX_QUOTA,
        description="maximum sends in flight of one user in one dispatcher to mail servers that "
        "have not replied to the last send; unset: a quarter of OUTBOX_DISPATCHER_CONCURRENCY, and "
        "at least 2",
    )
    user_stored_events: int = Field(
        5_000_000,
        ge=0,
        le=MAX_QUOTA,
        description="maximum stored events of jobs of one user; its oldest ones are removed",
    )
    user_suppressions: int = Field(
        5_000_000,
        ge=0,
        le=MAX_QUOTA,
        description="maximum suppressions of one user that calls create",
    )
    user_webhooks: int = Field(20, ge=0, le=MAX_QUOTA, description="maximum webhooks of one user")
    user_hourly_limit: int = Field(
        0,
        ge=0,
        le=MAX_HOURLY_LIMIT,
        description="maximum sends of one user in any OUTBOX_RATE_WINDOW, all its senders "
        "together; 0: no limit",
    )
    user_gap: Duration = Field(
        _ZERO,
        ge=_ZERO,
        le=timedelta(days=1),
        description="minimum time from the end of a send of one user to the start of its next, all "
        "its senders together; 0: none",
    )
    sender_policy: Literal["any", "domains"] = Field(
        "any",
        description="From addresses that users may choose: `any`, or those in the `domains` that "
        "an operator has assigned to the user",
    )
    special_domains: Literal["allow", "refuse"] = Field(
        "allow",
        description="addresses of senders and recipients in domains of private networks (`.local`, "
        "`.test`, `.home.arpa`): `allow`, or `refuse`",
    )
    upload_least_rate: int = Field(
        1_000,
        ge=0,
        le=1_000_000_000,
        description="bytes per second below which an upload is ended; 0 means any rate",
    )
    upload_patience: Duration = Field(
        timedelta(seconds=60),
        gt=_ZERO,
        le=timedelta(hours=1),
        description="how long an upload may send less than OUTBOX_UPLOAD_LEAST_RATE, or nothing",
    )
    encryption_keys: SecretStr = Field(
        SecretStr(""),
        description="Fernet keys for SMTP passwords, OAuth 2.0 secrets and webhook secrets, "
        "comma-separated, the newest first",
    )
    shutdown_grace: Duration = Field(
        timedelta(seconds=30), gt=_ZERO, description="longest wait for work in flight on SIGTERM"
    )
    max_message_bytes: int = Field(
        10 * 1024 * 1024,
        ge=1024,
        le=100 * 1024 * 1024,
        description="largest mail, in bytes, as built and encoded",
    )
    template_workers: int = Field(
        2,
        ge=1,
        le=64,
        description="processes of one service in which templates with more than columns are parsed "
        "and rendered; one user gets at most all but one",
    )
    template_budget: Duration = Field(
        timedelta(seconds=1),
        ge=timedelta(milliseconds=10),
        le=timedelta(minutes=1),
        description="processor time to parse one template, and to render one mail",
    )
    template_memory: int = Field(
        256 * 1024 * 1024,
        ge=128 * 1024 * 1024,
        le=16 * 1024 * 1024 * 1024,
        description="address space of one such process, in bytes",
    )
    metrics_listen: str = Field(
        "",
        description="host:port that serves Prometheus metrics over HTTP, at `/metrics`; each "
        "process needs its own",
    )
    traces_endpoint: str = Field(
        "",
        description="OTLP gRPC endpoint that gets OpenTelemetry traces: http://host:4317, or "
        "https:// for TLS; unset: no traces",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lowest level that is logged: `debug`, `info`, `warning` or `error`"
    )
    log_format: Literal["json", "text"] = Field(
        "json", description="`json`: one JSON document per line; `text`: lines for people"
    )
    log_addresses: bool = Field(
        False,
        description="log mail addresses, replies of mail servers and complete error texts, which "
        "may quote a mail",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources of values; earlier ones take precedence."""
        del file_secret_settings
        overrides = cast(InitSettingsSource, init_settings).init_kwargs
        files = SecretFiles(settings_cls, overrides, env_settings, dotenv_settings)
        return init_settings, files, env_settings, dotenv_settings

    @field_validator("retention")
    @classmethod
    def _keeps_what_limits_need(
        cls, value: timedelta | None, info: ValidationInfo
    ) -> timedelta | None:
        """Refuse a retention that removes sends which a limit may still have to count."""
        # Settings with wrong values are missing here.
        check_retention(
            value, info.data.get("rate_window", _ZERO), info.data.get("quota_day", _ZERO)
        )
        return value


def check_retention(
    retention: timedelta | None, rate_window: timedelta, quota_day: timedelta
) -> None:
    """Check that a retention keeps the sends which a limit may still have to count.

    Raises:
        ValueError: it does not.
    """
    if retention is None:
        return
    needed = {"1d (the longest gap)": MAX_GAP}
    for name, span in (("rate_window", rate_window), ("quota_day", quota_day)):
        needed[f"OUTBOX_{name.upper()} ({format_duration(span)})"] = span
    for what, span in needed.items():
        if retention < span:
            raise ValueError(f"must be 0 or at least {what} (got {format_duration(retention)})")


def load_settings(**overrides: Any) -> Settings:
    """Read the environment; `overrides` win.

    Raises:
        ConfigurationError: a variable is wrong; the text names it and says what would be right.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            name = str(detail["loc"][0])
            takes = Settings.model_fields[name].description if name in Settings.model_fields else ""
            lines.append(f"OUTBOX_{name.upper()}: {_explain(detail)} ({takes})")
        raise ConfigurationError("; ".join(lines)) from None


# Our texts by the library's kinds of error.
_WRONG = {
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "is too large",
    "bool_parsing": "must be true or false",
    "float_parsing": "must be a number",
    "string_type": "must be a text",
}


def _explain(detail: ErrorDetails) -> str:
    """Return what is wrong, with the library's phrases replaced by ours."""
    own = _WRONG.get(detail["type"])
    if own is not None:
        return own
    said = detail["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return said.replace(repr(_ZERO), "0 seconds")
