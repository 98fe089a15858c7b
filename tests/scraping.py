"""Scrapes the metrics of a service, as Prometheus does."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]


class Scrape:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families: dict[str, str] = {}
        self._samples: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(text):
            name = family.name + ("_total" if family.type == "counter" else "")
            self.families[name] = family.type
            for sample in family.samples:
                by_labels = self._samples.setdefault(sample.name, {})
                by_labels[frozenset(sample.labels.items())] = sample.value

    def value(self, name: str, **labels: str) -> float:
        """Return a sample, or 0 if it is missing."""
        return self._samples.get(name, {}).get(frozenset(labels.items()), 0.0)

    def all(self, name: str) -> Mapping[Labels, float]:
        """Return the samples with a name, by their labels."""
        return self._samples.get(name, {})


def _read(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


async def scrape(address: str) -> Scrape:
    """Scrape the service that listens on `address`."""
    return Scrape(await asyncio.to_thread(_read, address))
