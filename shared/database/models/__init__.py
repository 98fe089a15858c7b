"""The tables. PostgreSQL is the source of truth: it stores every job and every attempt.

The ids of senders, batches and jobs come from `shared.id_source`. Their sequences are left for the
release before this one, which may run at the same time.

Rows of `email_jobs` are narrow: `batches` stores what the jobs of a batch share, and only the CSV
columns that the templates use are stored.
"""

from __future__ import annotations

from outbox_server.shared.database.models.base import (
    Base,
)
from outbox_server.shared.database.models.changes import AuditEvent, ChangeRequest
from outbox_server.shared.database.models.counts import (
    BatchCount,
    CountDelta,
    PurgedCount,
    SenderCount,
    SenderHourCount,
)
from outbox_server.shared.database.models.events import (
    JobEvent,
    JobEventCount,
    JobEventCounting,
    WebhookDeliveryRow,
    WebhookRow,
)
from outbox_server.shared.database.models.installation import (
    AgreedSettingsRow,
    DispatcherRow,
    EndpointReportRow,
    ErasureKey,
    Heartbeat,
    HeldSend,
    HoldRelease,
    HoldRow,
    Installation,
    ShardLife,
)
from outbox_server.shared.database.models.job_changes import (
    JobChange,
    JobChangeBlock,
)
from outbox_server.shared.database.models.mail import (
    ApiKeyRow,
    Attempt,
    Batch,
    BatchCancellation,
    BatchRejection,
    BatchRespread,
    EmailJob,
    HeadMarker,
    Suppression,
    SuppressionCount,
    UserRow,
)
from outbox_server.shared.database.models.senders import Cooldown, OAuth2CredentialsRow, Sender

__all__ = [
    "AgreedSettingsRow",
    "ApiKeyRow",
    "Attempt",
    "AuditEvent",
    "Base",
    "Batch",
    "BatchCancellation",
    "BatchCount",
    "BatchRejection",
    "BatchRespread",
    "ChangeRequest",
    "Cooldown",
    "CountDelta",
    "DispatcherRow",
    "EmailJob",
    "EndpointReportRow",
    "ErasureKey",
    "HeadMarker",
    "Heartbeat",
    "HeldSend",
    "HoldRelease",
    "HoldRow",
    "Installation",
    "JobChange",
    "JobChangeBlock",
    "JobEvent",
    "JobEventCount",
    "JobEventCounting",
    "OAuth2CredentialsRow",
    "PurgedCount",
    "Sender",
    "SenderCount",
    "SenderHourCount",
    "ShardLife",
    "Suppression",
    "SuppressionCount",
    "UserRow",
    "WebhookDeliveryRow",
    "WebhookRow",
]
