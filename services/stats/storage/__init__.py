"""All SQL of the stats service: folds the count deltas, and reads what the methods return."""

from outbox_server.services.stats.storage.counting import (
    HourCounts,
    SenderStats,
    UserSender,
    UserStats,
    WatchedSender,
    read_sender,
    read_user,
    read_watched,
)
from outbox_server.services.stats.storage.folding import FOLD_LIMIT, fold, fold_once
from outbox_server.services.stats.storage.gauges import read_gauges
from outbox_server.services.stats.storage.series import BucketCounts, read_series
from outbox_server.services.stats.storage.subjects import (
    EndpointFailure,
    last_failure,
    sender_exists,
    sender_of_batch,
)
from outbox_server.shared.database.engine import snapshot

__all__ = [
    "FOLD_LIMIT",
    "BucketCounts",
    "EndpointFailure",
    "HourCounts",
    "SenderStats",
    "UserSender",
    "UserStats",
    "WatchedSender",
    "fold",
    "fold_once",
    "last_failure",
    "read_gauges",
    "read_sender",
    "read_series",
    "read_user",
    "read_watched",
    "sender_exists",
    "sender_of_batch",
    "snapshot",
]
