"""`outbox gateway` in a real deployment: TLS on both sides, metrics, other origins."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from outbox_server.deploy.certificates import Certificate, self_signed
from outbox_server.deploy.ports import LOOPBACK, free_port
from tests.eventually import eventually
from tests.peers import HALF_A_HELLO, Flood
from tests.scheduler_stack import running_scheduler

OUTBOX = Path(sys.executable).with_name("outbox")
ORIGIN = "https://app.example.com"


async def curl(*words: str) -> str:
    done = await asyncio.create_subprocess_exec(
        "curl", "-s", "--max-time", "20", *words, stdout=subprocess.PIPE
    )
    out, _ = await done.communicate()
    return out.decode()


@asynccontextmanager
async def running_gateway(folder: Path, *words: str) -> AsyncIterator[None]:
    with (folder / "gateway.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            OUTBOX, "gateway", "--concurrency", "1", *words, stdout=log, stderr=log
        )
    try:
        yield
        # The services still run: they have answered.
        assert process.returncode is None, (folder / "gateway.log").read_text()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def listening(port: int, certificate: Certificate) -> tuple[str, ...]:
    files = ("--tls-certificate", str(certificate.public), "--tls-key", str(certificate.private))
    return ("--listen", f"{LOOPBACK}:{port}", *files)


async def test_calls_are_encrypted_on_both_sides_and_only_metrics_are_public(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    inside, outside = self_signed(tmp_path / "inside"), self_signed(tmp_path / "outside")
    port, metrics_port = free_port(), free_port()
    url, metrics = f"https://{LOOPBACK}:{port}", f"http://{LOOPBACK}:{metrics_port}"
    trusting = ("--cacert", str(outside.public))
    async with AsyncExitStack() as stack:
        scheduler = await stack.enter_async_context(
            running_scheduler(
                database_url,
                redis_url,
                tls_certificate=str(inside.public),
                tls_key=str(inside.private),
            )
        )
        options = (
            *("--scheduler", scheduler.address, "--stats", scheduler.address),
            *("--services-ca", str(inside.public), "--origin", ORIGIN),
            *("--metrics", f"{LOOPBACK}:{metrics_port}"),
        )
        async with running_gateway(tmp_path, *listening(port, outside), *options):
            senders = f"{url}/api/senders?user_id=ann"
            # The call may come before the first health check too.
            await eventually(lambda: curl(*trusting, senders))
            assert json.loads(await curl(*trusting, senders))["senders"] == []
            silent = Flood(port, first=HALF_A_HELLO)
            stack.enter_context(silent)
            await silent.open(20)
            assert await curl(senders) == ""  # an unknown certificate
            assert await curl(senders.replace("https:", "http:")) == ""

            for origin, allowed in ((ORIGIN, True), ("https://evil.example.com", False)):
                preflight = await curl(
                    *(*trusting, "-i", "-X", "OPTIONS", "-H", f"origin: {origin}"),
                    *("-H", "access-control-request-method: POST", senders),
                )
                assert (f"access-control-allow-origin: {origin}" in preflight) is allowed

            # A new certificate replaces the old one, and the old one is then unknown.
            new = self_signed(tmp_path / "new")
            new.private.replace(outside.private)
            new.public.rename(outside.public)
            await eventually(lambda: curl(*trusting, senders))

            page = await curl(f"{metrics}/stats/prometheus")
            assert "envoy_cluster_upstream_rq_total" in page
            for path in ("/", "/quitquitquit", "/config_dump"):
                answer = await curl("-X", "POST", "-w", "%{http_code}", f"{metrics}{path}")
                assert answer == "404"
            # After 10 s, handshakes that do not end are ended.
            await eventually(lambda: silent.alive() == 0)


async def test_a_service_with_an_unknown_certificate_is_not_called(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    inside, outside = self_signed(tmp_path / "inside"), self_signed(tmp_path / "outside")
    port = free_port()
    async with running_scheduler(
        database_url,
        redis_url,
        tls_certificate=str(inside.public),
        tls_key=str(inside.private),
    ) as scheduler:
        options = (
            *("--scheduler", scheduler.address, "--stats", scheduler.address),
            *("--services-ca", str(outside.public)),
        )
        async with running_gateway(tmp_path, *listening(port, outside), *options):
            url = f"https://{LOOPBACK}:{port}/api/senders?user_id=ann"
            answer = json.loads(
                await eventually(lambda: curl("--cacert", str(outside.public), url))
            )
            assert answer["details"][0]["reason"] == "GATEWAY_UNAVAILABLE"


def test_the_files_for_a_separate_envoy_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    done = subprocess.run(
        [OUTBOX, "gateway", "--write-only", "--folder", folder],
        capture_output=True,
        text=True,
        check=True,
    )
    config = Path(done.stdout.strip())
    assert config == folder / "envoy.json"
    assert str(folder / "outbox.binpb") in config.read_text()
    names = {path.name for path in folder.iterdir()}
    assert {"envoy.json", "outbox.binpb", "openapi.json", "index.html"} <= names
