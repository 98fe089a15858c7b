"""`outbox gateway`: runs Envoy in front of the services of a real deployment."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Final

import typer

from outbox_server.cli.terminal import say
from outbox_server.deploy.envoy.files import envoy_command, write_folder
from outbox_server.deploy.envoy.gateway import Gateway, TlsFiles
from outbox_server.shared.callers import is_loopback
from outbox_server.shared.errors import ConfigurationError

_ADDRESS: Final = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})|unix:/.+")
_ORIGIN: Final = re.compile(r"https?://[^/\s,]+")
_MAX_PORT: Final = 65_535

app = typer.Typer(add_completion=False)


def _address(text: str) -> str:
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found[1] or 1) > _MAX_PORT:
        raise typer.BadParameter(f"must be host:port, such as 127.0.0.1:8080 (got {text!r})")
    return text


def _listen_address(text: str) -> str:
    if text.startswith("unix:"):
        raise typer.BadParameter(f"must be host:port, such as 127.0.0.1:8080 (got {text!r})")
    return _address(text)


def _origin(text: str) -> str:
    if not _ORIGIN.fullmatch(text):
        raise typer.BadParameter(f"must be like https://app.example.com (got {text!r})")
    return text


@app.command()
def gateway(
    *,
    listen: Annotated[
        str,
        typer.Option(
            parser=_listen_address, metavar="HOST:PORT", help="The address that clients call."
        ),
    ] = "127.0.0.1:8080",
    scheduler: Annotated[
        str, typer.Option(parser=_address, metavar="HOST:PORT", help="The schedulers.")
    ] = "127.0.0.1:50051",
    stats: Annotated[
        str, typer.Option(parser=_address, metavar="HOST:PORT", help="The stats services.")
    ] = "127.0.0.1:50053",
    dispatcher: Annotated[
        str | None,
        typer.Option(
            parser=_address,
            metavar="HOST:PORT",
            help="The dispatcher, for operators (default: its methods are not offered).",
        ),
    ] = None,
    tls_certificate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Certificate chain for clients (PEM)."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its private key (PEM).")
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Require client certificates of this CA."),
    ] = None,
    plaintext: Annotated[
        bool,
        typer.Option("--plaintext", help="Serve without TLS, because an ingress or mesh encrypts."),
    ] = False,
    services_tls: Annotated[
        bool, typer.Option("--services-tls", help="Use TLS to the services.")
    ] = False,
    services_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CA of the services' certificates (default: the machine's CAs).",
        ),
    ] = None,
    services_certificate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Client certificate for the services."),
    ] = None,
    services_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its private key (PEM).")
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(
            parser=_origin,
            metavar="URL",
            help="Let web pages of this origin call the API (CORS). Repeatable.",
        ),
    ] = None,
    trusted_proxies: Annotated[
        int,
        typer.Option(
            min=0, max=10, help="Number of proxies in front that set x-forwarded-for correctly."
        ),
    ] = 0,
    metrics: Annotated[
        str | None,
        typer.Option(
            parser=_listen_address,
            metavar="HOST:PORT",
            help="Serve Envoy's metrics for Prometheus there, at /stats/prometheus.",
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=64, help="Number of Envoy's worker threads.")
    ] = 2,
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Where Envoy's files are written (default: a temporary folder)."
        ),
    ] = None,
    write_only: Annotated[
        bool,
        typer.Option(
            "--write-only", help="Write the files to --folder, for an Envoy of your own, and end."
        ),
    ] = False,
) -> None:
    r"""Run Envoy: REST, gRPC-Web and gRPC on one port, in front of the services.

    The API is described at /openapi.json, and can be tried at /docs. GET
    /healthz answers 200 while Envoy runs. SIGTERM ends it at once, so let
    load balancers notice first.

    An address beyond loopback needs TLS, or --plaintext if something else
    encrypts. The services must require API keys: Envoy only passes them on.

    $ outbox gateway --listen 0.0.0.0:8443 --tls-certificate tls.crt \
      --tls-key tls.key --scheduler scheduler:50051 --stats stats:50053
    """
    if write_only and folder is None:
        raise typer.BadParameter("--write-only needs --folder")
    for option, path in (
        ("--tls-certificate", tls_certificate),
        ("--tls-key", tls_key),
        ("--tls-client-ca", tls_client_ca),
        ("--services-ca", services_ca),
        ("--services-certificate", services_certificate),
        ("--services-key", services_key),
    ):
        _check_file(option, path)
    tls = _tls("--tls", tls_certificate, tls_key, tls_client_ca, "--tls-client-ca")
    upstream = _tls("--services", services_certificate, services_key, None, "")
    if services_ca is not None or services_tls or upstream is not None:
        upstream = TlsFiles(*map(_absolute, (services_certificate, services_key, services_ca)))
    if tls is None and not plaintext and not is_loopback(listen):
        raise ConfigurationError(
            f"--listen: other machines can reach {listen}, and API keys would be sent there "
            "unencrypted; set --tls-certificate and --tls-key, listen on 127.0.0.1, or set "
            "--plaintext if an ingress or a mesh encrypts"
        )
    processes = {"scheduler": scheduler, "stats": stats}
    config = write_folder(
        Gateway(
            listen,
            (folder or Path(tempfile.mkdtemp(prefix="outbox-gateway-"))).absolute(),
            processes | ({"dispatcher": dispatcher} if dispatcher else {}),
            tls=tls,
            upstream_tls=upstream,
            origins=tuple(origin or ()),
            trusted_proxies=trusted_proxies,
            metrics_listen=metrics or "",
        )
    )
    if write_only:
        say(str(config))
        return
    command = [*envoy_command(config), "--concurrency", str(concurrency)]
    os.execv(command[0], command)  # noqa: S606 - our own command line


def _check_file(option: str, path: Path | None) -> None:
    if path is None:
        return
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigurationError(f"{option}: {path} cannot be read: {error.strerror}") from None


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _tls(
    prefix: str, certificate: Path | None, key: Path | None, ca: Path | None, ca_option: str
) -> TlsFiles | None:
    if (certificate is None) != (key is None):
        raise ConfigurationError(f"{prefix}-certificate and {prefix}-key: set both, or neither")
    if certificate is None:
        if ca is not None:
            raise ConfigurationError(f"{ca_option} needs {prefix}-certificate and {prefix}-key")
        return None
    return TlsFiles(*map(_absolute, (certificate, key, ca)))
