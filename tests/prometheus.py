"""Debian's Prometheus, with a configuration of a test."""

from __future__ import annotations

import asyncio
import json
import signal
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

import yaml

from outbox_server.deploy.child import Child
from outbox_server.deploy.ports import LOOPBACK, free_port

_STARTS_WITHIN_S: Final = 60.0
_ANSWERS_WITHIN_S: Final = 30.0
_ENDS_WITHIN_S: Final = 10.0


class Prometheus:
    """A Prometheus that scrapes and evaluates rules every second; it runs in its context."""

    def __init__(self, folder: Path, scrape_configs: Sequence[dict[str, Any]], rules: str) -> None:
        """`rules` is the text of a file with rules."""
        folder.mkdir()
        self._address = f"{LOOPBACK}:{free_port()}"
        times = ("scrape_interval", "scrape_timeout", "evaluation_interval")
        config: dict[str, Any] = {
            "global": dict.fromkeys(times, "1s"),
            "rule_files": ["rules.yml"],
            "scrape_configs": list(scrape_configs),
        }
        (folder / "rules.yml").write_text(rules)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._child = Child(
            "prometheus",
            [
                "/usr/bin/prometheus",
                "--config.file=prometheus.yml",
                "--storage.tsdb.path=data",
                f"--web.listen-address={self._address}",
            ],
            log=folder / "log",
            cwd=folder,
        )

    async def __aenter__(self) -> Self:
        self._child.start()
        await self._child.until_ready(self._ready, _STARTS_WITHIN_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._child.stop((signal.SIGTERM, _ENDS_WITHIN_S))

    async def get(self, path: str, **parameters: str) -> Any:
        """Return the data that the API answers, such as `query`.

        Raises:
            OSError: Prometheus does not answer.
        """
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        return json.loads(await asyncio.to_thread(_get, url))["data"]

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an expression now."""
        found: list[dict[str, Any]] = (await self.get("query", query=expression))["result"]
        return found

    async def _ready(self) -> bool:
        try:
            await asyncio.to_thread(_get, f"http://{self._address}/-/ready")
        except OSError:
            return False
        return True


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_ANSWERS_WITHIN_S) as answer:
        return str(answer.read().decode())
