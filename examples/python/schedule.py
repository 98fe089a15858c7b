"""Schedules two mails with outbox_client and waits until they are sent.

python schedule.py [HOST:PORT of the scheduler]
"""

from __future__ import annotations

import sys
import uuid

from outbox.v1.batch_pb2 import BatchOptions
from outbox.v1.email_job_service_pb2 import ListEmailJobsRequest
from outbox.v1.sender_pb2 import Sender
from outbox.v1.sender_service_pb2 import CreateSenderRequest
from outbox_client import CallError, Client

PEOPLE = [
    {"email": "ann@example.com", "name": "Ann"},
    {"email": "bob@example.com", "name": "Bob"},
]


def main(scheduler: str) -> None:
    """Create a sender, schedule two mails and wait until they are sent."""
    # With API keys and TLS: Client(scheduler, api_key="...", tls=Tls()).
    with Client(scheduler) as outbox:
        sender = outbox.senders.CreateSender(
            # With a request_id, the client may repeat the call after an answer that got lost.
            CreateSenderRequest(
                request_id=str(uuid.uuid4()),
                user_id="python",
                sender=Sender(email="python@example.com"),
            ),
            timeout=10,
        )
        # The rows may also be a path, a file, a cursor or a DataFrame.
        answer = outbox.upload(
            PEOPLE,
            BatchOptions(
                user_id="python",
                sender_id=sender.sender_id,
                subject="Hello {{ name }}",
                body="Good to see you.",
            ),
        )
        print(f"accepted {answer.batch.accepted_count}, rejected {answer.batch.rejected_count}")
        # Each change until all mails have ended, over restarts of the server. `wait_for_batch`
        # returns the last one.
        for batch in outbox.watch_batch(answer.batch.batch_id, "python"):
            print(f"waiting {batch.counts.scheduled_count}")
        print(f"sent {batch.counts.sent_count}")
        request = ListEmailJobsRequest(batch_id=batch.batch_id, user_id="python")
        for job in outbox.list_email_jobs(request):
            print(job.recipient, job.send_time.ToJsonString())


if __name__ == "__main__":
    try:
        main(*sys.argv[1:] or ["127.0.0.1:50051"])
    except CallError as error:
        for violation in error.violations:
            print(f"{violation.field}: {violation.description}", file=sys.stderr)
        sys.exit(f"{error.message} ({error.code.name}, {error.reason})")
