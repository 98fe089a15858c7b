"""All SQL of the dispatcher: set-based statements over the jobs of one group (group commit).

The guard of every statement is the job's state together with its attempt number, the fencing token:
what a newer attempt has touched cannot be changed by an older one.
"""

from outbox_server.services.dispatcher.storage.cooldowns import (
    AccountRefusal,
    cool_down,
    end_cooldowns,
    refused_in_a_row,
)
from outbox_server.services.dispatcher.storage.marking import (
    BatchContent,
    MarkedJob,
    mark_sending,
    read_batches,
)
from outbox_server.services.dispatcher.storage.recovering import next_expiry, recover_expired
from outbox_server.services.dispatcher.storage.renewing import renew_leases
from outbox_server.services.dispatcher.storage.settling import AttemptRecord, give_back, settle

__all__ = [
    "AccountRefusal",
    "AttemptRecord",
    "BatchContent",
    "MarkedJob",
    "cool_down",
    "end_cooldowns",
    "give_back",
    "mark_sending",
    "next_expiry",
    "read_batches",
    "recover_expired",
    "refused_in_a_row",
    "renew_leases",
    "settle",
]
