"""What another user of this machine can do to an embedded stack.

    python -m tests.another_user < request.json

Started as root, it becomes a user without rights. Otherwise it stays who it is, and knows no
password. It reads a request with paths, process ids, ports and addresses, and prints what worked.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any, Final

import grpc
import psycopg
import redis
from outbox.v1.sender_service_pb2 import ListSendersRequest
from outbox.v1.sender_service_pb2_grpc import SenderServiceStub
from redis.backoff import NoBackoff
from redis.retry import Retry

# No account has it, so no file is its own.
STRANGER: Final = 61_234
_LIMIT_S: Final = 20


def try_all(request: dict[str, Any]) -> dict[str, list[str]]:
    """Return what worked, by kind of attempt."""
    return {
        "read": [path for path in request["paths"] if _reads(Path(path))],
        "entered": [path for path in request["folders"] if os.access(path, os.R_OK | os.X_OK)],
        "environments": [
            str(pid) for pid in request["pids"] if _reads(Path(f"/proc/{pid}/environ"))
        ],
        "databases": _logins(request["postgres"]),
        "redis": _redis_commands(request["redis"]),
        "calls": _calls(request["scheduler"]),
    }


def _reads(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


def _logins(port: int) -> list[str]:
    found = []
    # By TCP, and by the folders of sockets that clients use by default.
    hosts = ("127.0.0.1", "/tmp", "/var/run/postgresql")
    for host, role in itertools.product(hosts, ("postgres", "outbox")):
        # A server that trusts everybody ignores it.
        password = role
        try:
            with psycopg.connect(
                host=host, port=port, user=role, password=password, dbname="postgres"
            ):
                found.append(f"{role} at {host} with {password!r}")
        except psycopg.OperationalError:
            continue
    return found


def _redis_commands(port: int) -> list[str]:
    found = []
    for command in ("PING", "KEYS *", "CONFIG GET requirepass", "FLUSHALL"):
        with redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as client:
            try:
                client.execute_command(*command.split())
            except redis.RedisError:
                continue
            found.append(command)
    return found


def _calls(address: str) -> list[str]:
    with grpc.insecure_channel(address) as channel:
        try:
            SenderServiceStub(channel).ListSenders(
                ListSendersRequest(user_id="u"), timeout=_LIMIT_S
            )
        except grpc.RpcError as error:
            return [] if error.code() is grpc.StatusCode.UNAUTHENTICATED else [str(error)]
    return ["ListSenders"]


def main() -> None:
    """Give up root's rights, and try everything."""
    request = json.load(sys.stdin)
    if os.geteuid() == 0:
        # All modules must be loaded by now: the stranger may not be able to enter their folder.
        try_all(request | {"pids": [], "postgres": 1, "redis": 1, "scheduler": "127.0.0.1:1"})
        os.chdir("/")
        os.setgroups([])
        os.setresgid(STRANGER, STRANGER, STRANGER)
        os.setresuid(STRANGER, STRANGER, STRANGER)
    json.dump(try_all(request), sys.stdout)


if __name__ == "__main__":
    main()
