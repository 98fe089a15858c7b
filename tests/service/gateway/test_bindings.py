"""Every HTTP rule of the contract reaches its method."""

from __future__ import annotations

import base64
import re
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet

from outbox_server.deploy.contract import PACKAGE, read_descriptors, rules_of
from tests.gateway_stack import GatewayStack, HttpAnswer

UNCERTAIN = {"resolution": "UNCERTAIN_RESOLUTION_SENT"}
ROWS = {"rows": [{"email": "ann@example.com"}]}


def rules() -> list[tuple[str, str]]:
    return [
        (verb.upper(), re.sub(r"{(?:\w+\.)?(\w+)}", r"{\1}", url))
        for file in FileDescriptorSet.FromString(read_descriptors()).file
        if file.package == PACKAGE
        for service in file.service
        for method in service.method
        for verb, url, _ in rules_of(method)
    ]


def options(sender_id: str, request_id: str) -> dict[str, str]:
    return {"request_id": request_id, "sender_id": sender_id, "subject": "Hi", "body": "Hi"}


def bodies(sender_id: str) -> dict[tuple[str, str], Any]:
    """Return the body for each call that needs one."""
    chunk = base64.b64encode(b"email\nann@example.com\n").decode()
    return {
        ("POST", "/api/senders"): {"email": "ann@example.com"},
        ("PATCH", "/api/senders/{sender_id}"): {"hourly_limit": 7},
        ("POST", "/api/email-jobs/schedule"): {
            "options": options(sender_id, "rule 1"),
            "recipients": ROWS,
        },
        ("POST", "/api/batches"): {"options": options(sender_id, "rule 2"), "csv": chunk},
        ("POST", "/api/batches:upload"): [
            {"options": options(sender_id, "rule 3")},
            {"chunk": chunk},
        ],
        ("POST", "/api/batches:uploadFile"): b"email\nann@example.com\n",
        ("POST", "/api/batches:preview"): {
            "options": options(sender_id, "rule 5"),
            "recipients": ROWS,
        },
        ("POST", "/api/batches:sendTestEmail"): {
            "options": options(sender_id, "rule 6"),
            "recipient": {"email": "ann@example.com"},
        },
        ("POST", "/api/email-jobs:retry"): {"sender_id": sender_id},
        ("POST", "/api/email-jobs:cancel"): {"sender_id": sender_id, "validate_only": True},
        ("POST", "/api/email-jobs:reschedule"): {"sender_id": sender_id, "delay": "60s"},
        ("POST", "/api/email-jobs/{email_job_id}:resolve"): UNCERTAIN,
        ("POST", "/api/stats:forecast"): {
            "planned_batch": {"options": {"sender_id": sender_id}, "recipient_count": 5}
        },
        ("POST", "/api/suppressions"): {"email": "bob@example.com"},
        ("POST", "/api/suppressions:import"): [{"chunk": chunk}],
        ("POST", "/api/suppressions:importFile"): b"email\nann@example.com\n",
    }


def queries(sender_id: str) -> dict[tuple[str, str], str]:
    uploaded = options(sender_id, "rule 4")
    return {
        ("GET", "/api/stats"): f"sender_id={sender_id}",
        ("POST", "/api/batches:uploadFile"): "&".join(
            f"options.{name}={value}" for name, value in uploaded.items()
        ),
        ("DELETE", "/api/senders/{sender_id}"): "force=true",
    }


# The refusals of the methods themselves.
REFUSED = {
    ("POST", "/api/email-jobs/{email_job_id}:resolve"): "NOT_UNCERTAIN",
    ("GET", "/api/dispatcher"): "OPERATOR_REQUIRED",
    ("POST", "/api/dispatcher:drain"): "OPERATOR_REQUIRED",
    ("GET", "/api/hold"): "OPERATOR_REQUIRED",
    ("POST", "/api/hold"): "OPERATOR_REQUIRED",
    ("POST", "/api/hold:release"): "OPERATOR_REQUIRED",
    ("POST", "/api/hold:cancel"): "OPERATOR_REQUIRED",
}
# These run last and in this order, because they change resources that the others need.
LAST = [
    ("DELETE", "/api/suppressions/{email}"),
    ("DELETE", "/api/email-jobs/{email_job_id}"),
    ("DELETE", "/api/senders/{sender_id}"),
]


def test_every_rule_reaches_its_method(gateway: GatewayStack) -> None:
    sender_id = gateway.sender()
    batch_id = gateway.batch(sender_id)
    jobs = gateway.call("GET", f"/api/email-jobs?batch_id={batch_id}", key="ann").document
    ids = {
        "sender_id": sender_id,
        "batch_id": batch_id,
        "email_job_id": jobs["email_jobs"][0]["email_job_id"],
        "user_id": "ann",
        "email": "bob%40example.com",
    }
    found: dict[tuple[str, str], HttpAnswer] = {}
    for rule in sorted(rules(), key=lambda rule: LAST.index(rule) if rule in LAST else -1):
        verb, url = rule
        path = re.sub(r"{(\w+)}", lambda name: ids.get(name[1], "1"), url)
        if query := queries(sender_id).get(rule):
            path = f"{path}?{query.replace(' ', '%20')}"
        # A watch does not end by itself.
        found[rule] = gateway.call(
            verb, path, bodies(sender_id).get(rule), key="ann", grpc_timeout="4S"
        )
    for rule, answer in found.items():
        if answer.status != 200:
            reason = answer.reason
            assert not reason.startswith("GATEWAY_"), (rule, answer)
            # A new method may need other ids than those above; then its test is elsewhere.
            assert rule not in KNOWN or reason == REFUSED.get(rule), (rule, answer)
    assert set(found) >= KNOWN


KNOWN = {*REFUSED, *LAST, *bodies(""), *queries("")} | {
    ("GET", "/api/senders/{sender_id}"),
    ("GET", "/api/senders"),
    ("POST", "/api/senders/{sender_id}:pause"),
    ("POST", "/api/senders/{sender_id}:resume"),
    ("POST", "/api/senders/{sender_id}:verify"),
    ("GET", "/api/batches"),
    ("GET", "/api/batches/{batch_id}"),
    ("GET", "/api/batches/{batch_id}/rejections"),
    ("POST", "/api/batches/{batch_id}:cancel"),
    ("GET", "/api/batches/{batch_id}:watch"),
    ("GET", "/api/batches/{batch_id}/email-jobs"),
    ("GET", "/api/email-jobs"),
    ("GET", "/api/email-jobs/{email_job_id}"),
    ("GET", "/api/email-jobs/{email_job_id}/attempts"),
    ("GET", "/api/email-jobs/{email_job_id}:explain"),
    ("POST", "/api/email-jobs/{email_job_id}:cancel"),
    ("GET", "/api/senders/{sender_id}/stats"),
    ("GET", "/api/senders/{sender_id}/stats:watch"),
    ("GET", "/api/stats/user"),
    ("GET", "/api/users/{user_id}/stats"),
    ("GET", "/api/senders/{sender_id}/series"),
    ("GET", "/api/batches/{batch_id}:forecast"),
    ("GET", "/api/senders/{sender_id}:audit"),
    ("GET", "/api/suppressions"),
}
