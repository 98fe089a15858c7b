"""gRPC and gRPC-Web on the gateway's port."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from outbox.v1 import sender_pb2

from outbox_server.deploy.contract import read_descriptors, services_of
from tests.gateway_stack import GatewayStack

BIN = Path(sys.executable).parent
DESCRIPTORS = Path(sender_pb2.__file__).with_name("outbox.binpb")


def buf(gateway: GatewayStack, protocol: str, method: str, request: object) -> str:
    http2 = ["--http2-prior-knowledge"] if protocol == "grpc" else []
    done = subprocess.run(
        [
            *(str(BIN / "buf"), "curl", "--protocol", protocol, *http2),
            *("--schema", f"{DESCRIPTORS}#format=binpb"),
            *("-H", f"authorization: Bearer {gateway.keys['ann']}"),
            *("-d", json.dumps(request), f"{gateway.url}/outbox.v1.{method}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("protocol", ["grpc", "grpcweb"])
def test_a_call_a_stream_and_an_error_pass_through(gateway: GatewayStack, protocol: str) -> None:
    sender_id = gateway.sender()
    batch_id = gateway.batch(sender_id)
    gateway.call("POST", f"/api/batches/{batch_id}:cancel", {}, key="ann")
    found = buf(gateway, protocol, "SenderService/GetSender", {"sender_id": sender_id})
    assert json.loads(found)["senderId"] == sender_id
    stats = buf(gateway, protocol, "StatsService/GetSenderStats", {"sender_id": sender_id})
    assert json.loads(stats)["counts"]["cancelledCount"] == "1"
    watched = buf(gateway, protocol, "BatchService/WatchBatch", {"batch_id": batch_id})
    assert json.loads(watched)["done"]
    error = json.loads(buf(gateway, protocol, "SenderService/GetSender", {"sender_id": "9999999"}))
    assert error["code"] == "not_found"
    assert error["details"][0]["type"] == "google.rpc.ErrorInfo"


def test_grpcurl_finds_the_schedulers_services_by_reflection(gateway: GatewayStack) -> None:
    def grpcurl(*words: str) -> str:
        done = subprocess.run(
            [BIN / "grpcurl", "-plaintext", *words], capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    sender_id = gateway.sender("bob")
    address = gateway.url.removeprefix("http://")
    assert "outbox.v1.BatchService" in grpcurl(address, "list")
    health = grpcurl(address, "grpc.health.v1.Health/Check")
    assert json.loads(health)["status"] == "SERVING"
    key = ("-H", f"authorization: Bearer {gateway.keys['bob']}")
    listed = grpcurl(*key, address, "outbox.v1.SenderService/ListSenders")
    assert sender_id in [sender["sender_id"] for sender in json.loads(listed)["senders"]]
    stats = grpcurl(
        *key, "-protoset", str(DESCRIPTORS), address, "outbox.v1.StatsService/GetUserStats"
    )
    assert json.loads(stats)["userId"] == "bob"


def test_every_service_of_the_contract_is_called_where_it_is_served(gateway: GatewayStack) -> None:
    services = services_of(read_descriptors())
    assert {service.process for service in services} == set(gateway.services)
    for service in services:
        done = subprocess.run(
            [BIN / "grpcurl", "-plaintext", gateway.services[service.process].address, "list"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert service.name in done.stdout.splitlines(), service
