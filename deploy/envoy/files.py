"""Writes the folder that Envoy runs from: its configuration, the descriptor set and the pages."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from outbox_server.deploy.contract import read_descriptors, services_of
from outbox_server.deploy.envoy.clusters import certificate_files
from outbox_server.deploy.envoy.config import build_config
from outbox_server.deploy.envoy.gateway import DESCRIPTORS, OPENAPI, Gateway
from outbox_server.deploy.openapi.document import build_document
from outbox_server.deploy.wheels import package_folder

CONFIG: Final = "envoy.json"
_EXTRA: Final = "gateway"
_PAGE: Final = Path(__file__).parent / "page"
_SWAGGER_UI: Final = ("swagger-ui-bundle.js", "swagger-ui.css")


def write_folder(gateway: Gateway) -> Path:
    """Write everything into `gateway.folder`, and return the file of the configuration.

    Raises:
        LocalServerError: Swagger UI is not installed.
    """
    folder = gateway.folder
    folder.mkdir(parents=True, exist_ok=True)
    descriptors = read_descriptors()
    (folder / DESCRIPTORS).write_bytes(descriptors)
    (folder / OPENAPI).write_text(openapi_text(descriptors), encoding="utf-8")
    for page in (*_PAGE.iterdir(), *_swagger_ui()):
        (folder / page.name).write_bytes(page.read_bytes())
    documents = {CONFIG: build_config(gateway, services_of(descriptors))}
    for name, document in (documents | certificate_files(gateway)).items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return folder / CONFIG


def openapi_text(descriptors: bytes) -> str:
    """Return the OpenAPI document of this version."""
    document = build_document(descriptors, importlib.metadata.version("outbox"))
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def envoy_command(config: Path) -> list[str]:
    """Return the command that runs Envoy.

    Raises:
        LocalServerError: it is not installed.
    """
    binary = package_folder("envoy", extra=_EXTRA) / "_bin" / "envoy"
    return [str(binary), "--config-path", str(config), *_OPTIONS]


# Not a hot restart: it needs a number of its own per Envoy on a machine.
_OPTIONS: Final = ("--disable-hot-restart", "--log-level", "warning")


def _swagger_ui() -> Sequence[Path]:
    folder = package_folder("swagger_ui_bundle", extra=_EXTRA) / "vendor"
    return [path for name in _SWAGGER_UI for path in folder.glob(f"swagger-ui-*/{name}")]
