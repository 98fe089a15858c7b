"""All SQL of the dispatcher. Each statement handles all jobs of a group at once (group commit).

Every statement checks the job's state and its attempt number, which is the fencing token. So an
older attempt cannot change what a newer one has written.
"""

from outbox_server.services.dispatcher.storage.cooldowns import (
    AccountRefusal,
    cool_down,
    end_cooldowns,
    refused_in_a_row,
)
from outbox_server.services.dispatcher.storage.heartbeats import (
    ServerIdentity,
    StoredBeat,
    read_heartbeat,
    read_identity,
    readable_functions,
    write_heartbeat,
)
from outbox_server.services.dispatcher.storage.marking import (
    MarkedJob,
    Marking,
    Unmarked,
    explain_unmarked,
    mark_sending,
)
from outbox_server.services.dispatcher.storage.recovering import next_expiry, recover_expired
from outbox_server.services.dispatcher.storage.renewing import renew_leases, still_sending
from outbox_server.services.dispatcher.storage.settling import AttemptRecord, give_back, settle
from outbox_server.services.dispatcher.storage.turning import settle_and_mark
from outbox_server.services.dispatcher.storage.upcoming import UpcomingBatch, find_upcoming_batches

__all__ = [
    "AccountRefusal",
    "AttemptRecord",
    "MarkedJob",
    "Marking",
    "ServerIdentity",
    "StoredBeat",
    "Unmarked",
    "UpcomingBatch",
    "cool_down",
    "end_cooldowns",
    "explain_unmarked",
    "find_upcoming_batches",
    "give_back",
    "mark_sending",
    "next_expiry",
    "read_heartbeat",
    "read_identity",
    "readable_functions",
    "recover_expired",
    "refused_in_a_row",
    "renew_leases",
    "settle",
    "settle_and_mark",
    "still_sending",
    "write_heartbeat",
]
