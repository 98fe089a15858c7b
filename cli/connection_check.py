"""Find out why no Outbox server answered a call.

gRPC reports all these failures as UNAVAILABLE, in its own words. A second connection over plain
sockets shows which step fails: the name, the TCP connection, TLS, or HTTP/2.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from urllib.request import getproxies, proxy_bypass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from outbox_client import Tls

# The time limit of a command's attempt to connect, and of each step that looks for the cause.
_LIMIT_S: Final = 5.0
# An HTTP/2 client's first bytes, with an empty SETTINGS frame (RFC 9113, section 3.4).
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_FRAME_HEADER: Final = 9
_SETTINGS_FRAME: Final = 4
_TLS_ALERT: Final = b"\x15\x03"
_MAX_BYTES_SHOWN: Final = 40
# OpenSSL's X509_V_ERR_* numbers.
_NOT_YET_VALID: Final = 9
_EXPIRED: Final = 10
_OTHER_NAME: Final = (62, 64)

# The name in a sentence, and one of the gRPC services that only this server has.
SERVERS: Final = {
    "scheduler": ("scheduler", "outbox.v1.SenderService"),
    "stats": ("stats service", "outbox.v1.StatsService"),
    "dispatcher": ("dispatcher", "outbox.v1.DispatcherService"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """The server of a failed call. `at` is its address in messages.

    `fix` is the advice if no server is there, `correction` if the address must be wrong.
    """

    host: str
    port: int
    title: str
    tls: Tls | None
    at: str
    fix: str
    correction: str


def channel_options() -> tuple[tuple[str, int], ...]:
    """Return gRPC's option for the time limit of one attempt to connect."""
    return (("grpc.min_reconnect_backoff_ms", int(_LIMIT_S * 1000)),)


def why_no_answer(target: Target) -> str:
    """Connect again, for a few seconds at most, and return the cause and the fix in one line."""
    wrong = why_no_connection(target) or (
        _wrong_without_tls(target) if target.tls is None else _wrong_with_tls(target)
    )
    return (
        wrong
        or f"{target.at} closed the connection during the call{_proxy_hint(target)}; try again"
    )


def why_no_connection(target: Target) -> str | None:
    """Return why no TCP connection can be made, and the fix; None if one can be made."""
    try:
        with _connected(target):
            return None
    except socket.gaierror:
        return f"the host name in {target.at} cannot be resolved: {target.correction}"
    except ConnectionRefusedError:
        return f"nothing listens at {target.at}: {target.fix}"
    except TimeoutError:
        return (
            f"no answer from {target.at} within {_LIMIT_S:g} s: the host is down, or a firewall "
            f"drops the connection; {target.fix}"
        )
    except OSError as error:
        return f"no connection to {target.at} ({error.strerror}): {target.fix}"


def which_server(address: str, tls: Tls | None, wanted: str) -> str | None:
    """Return the key in SERVERS of the server at `address`, or None if it is not an Outbox server.

    A proxy may lead to several of them, so `wanted` is tried first.
    """
    channel = (
        grpc.insecure_channel(address)
        if tls is None
        else grpc.secure_channel(address, tls.credentials())
    )
    with channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in sorted(SERVERS, key=lambda name: name != wanted):
            request = health_pb2.HealthCheckRequest(service=SERVERS[name][1])
            with contextlib.suppress(grpc.RpcError):
                health.Check(request, timeout=_LIMIT_S)
                return name
    return None


@contextlib.contextmanager
def _connected(target: Target) -> Iterator[socket.socket]:
    with socket.create_connection((target.host, target.port), timeout=_LIMIT_S) as stream:
        yield stream


def _wrong_without_tls(target: Target) -> str | None:
    """Return the problem of a connection without TLS, or None if the server speaks HTTP/2."""
    received = _first_bytes_without_tls(target)
    if received is not None and _is_http2(received):
        return None
    if received is not None and (
        received.startswith(_TLS_ALERT) or (not received and _speaks_tls(target))
    ):
        return (
            f"{target.at} uses TLS: add --tls-ca FILE (or set OUTBOX_TLS_CA) with the CA of its "
            "certificate, or `system` for the CAs of this machine"
        )
    return _other_server(target, received)


def _wrong_with_tls(target: Target) -> str | None:
    """Return the problem of a connection with TLS, or None if the server speaks HTTP/2."""
    tls = target.tls or Tls()
    try:
        context = _context(tls)
    except _WrongFileError as error:
        return str(error)
    try:
        with (
            _connected(target) as stream,
            context.wrap_socket(stream, server_hostname=target.host) as encrypted,
        ):
            received = _answer_to_preface(encrypted)
    except ssl.SSLCertVerificationError as error:
        return _wrong_certificate(target, tls, error.verify_code)
    except ssl.SSLError as error:
        return _wrong_handshake(target, tls, error.reason or "")
    except OSError:
        return _wrong_handshake(target, tls, "")
    if received is not None and _is_http2(received):
        return None
    # gRPC servers complete the handshake first and close without a TLS alert.
    return (
        _other_server(target, received)
        if received != b""
        else _refused_client_certificate(target, tls)
    )


class _WrongFileError(Exception):
    """A file of the client's TLS options has the wrong content."""


def _context(tls: Tls) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=tls.ca)
    except (OSError, ValueError):
        raise _WrongFileError(
            f"{tls.ca} (--tls-ca or OUTBOX_TLS_CA) is not a PEM file of certificates"
        ) from None
    if tls.certificate and tls.key:
        try:
            context.load_cert_chain(tls.certificate, tls.key)
        except (OSError, ValueError):
            raise _WrongFileError(
                f"{tls.certificate} (--tls-cert) and {tls.key} (--tls-key) are not a PEM "
                "certificate and its private key"
            ) from None
    context.set_alpn_protocols(["h2"])
    return context


def _wrong_certificate(target: Target, tls: Tls, code: int) -> str:
    if code == _EXPIRED:
        return f"the certificate of {target.at} has expired: renew it on the server"
    if code == _NOT_YET_VALID:
        return f"the certificate of {target.at} is not valid yet: check the clock of this machine"
    if code in _OTHER_NAME:
        return (
            f"the certificate of {target.at} is not for {target.host}: "
            "use a host name that the certificate contains"
        )
    trusted = f"the CA in {tls.ca}" if tls.ca else "a CA of this machine"
    return (
        f"the certificate of {target.at} is not signed by {trusted}: "
        "name the right CA with --tls-ca FILE (or OUTBOX_TLS_CA)"
    )


def _wrong_handshake(target: Target, tls: Tls, reason: str) -> str:
    """Return the problem of a failed handshake. `reason` is OpenSSL's, and may be empty."""
    if "CERTIFICATE" in reason or "UNKNOWN_CA" in reason:
        return _refused_client_certificate(target, tls)
    received = _first_bytes_without_tls(target)
    if received is not None and _is_http2(received):
        return f"{target.at} does not use TLS: leave out --tls-ca and OUTBOX_TLS_CA"
    if received and not received.startswith(_TLS_ALERT):
        return _other_server(target, received)
    return (
        f"the TLS handshake with {target.at} failed: it may not be a gRPC server; "
        f"{target.correction}"
    )


def _refused_client_certificate(target: Target, tls: Tls) -> str:
    if tls.certificate:
        return (
            f"{target.at} closes the connection after the TLS handshake: it probably refuses the "
            f"client certificate {tls.certificate}; use one that its client CA has signed"
        )
    return (
        f"{target.at} closes the connection after the TLS handshake: it probably requires a client "
        "certificate; add --tls-cert FILE and --tls-key FILE"
    )


def _first_bytes_without_tls(target: Target) -> bytes | None:
    try:
        with _connected(target) as stream:
            return _answer_to_preface(stream)
    except OSError:
        return b""


def _answer_to_preface(stream: socket.socket) -> bytes | None:
    """Return the server's first bytes to an HTTP/2 client, or None if it sends nothing in time."""
    received = b""
    try:
        stream.sendall(_PREFACE)
        while len(received) < _MAX_BYTES_SHOWN and (more := stream.recv(_MAX_BYTES_SHOWN)):
            received += more
            if len(received) >= _FRAME_HEADER and _is_http2(received):
                break
    except TimeoutError:
        return received or None
    except ssl.SSLError:
        raise
    except OSError:
        pass  # The connection broke. The bytes before that count.
    return received


def _is_http2(received: bytes) -> bool:
    """Return whether the bytes begin with a SETTINGS frame of stream 0, as HTTP/2 requires."""
    header = received[:_FRAME_HEADER]
    return (
        len(header) == _FRAME_HEADER
        and header[3] == _SETTINGS_FRAME
        and not any(header[5:])
        and int.from_bytes(header[:3], "big") % 6 == 0
    )


def _speaks_tls(target: Target) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # This only checks whether the server speaks TLS. Nothing is sent.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with _connected(target) as stream, context.wrap_socket(stream):
            return True
    except ssl.SSLError as error:
        # A TLS alert also shows that the server speaks TLS.
        return "ALERT" in (error.reason or "")
    except OSError:
        return False


def _other_server(target: Target, received: bytes | None) -> str:
    if received is None:
        found = f"accepts connections but sends nothing for {_LIMIT_S:g} s"
    elif not received:
        found = "closes each connection at once"
    elif received.startswith(b"HTTP/1"):
        found = "is an HTTP/1 server, and gRPC needs HTTP/2"
    else:
        shown = received[:_MAX_BYTES_SHOWN].decode("latin-1")
        found = f"is another kind of server (it sends {shown!r})"
    return f"{target.at} {found}, so it is not an Outbox {target.title}: {target.correction}"


def _proxy_hint(target: Target) -> str:
    """Return a hint at the proxy variable that gRPC obeys. The checks above ignore it."""
    proxies = getproxies()
    found = next((name for name in ("grpc", "https", "http") if name in proxies), None)
    if found is None or proxy_bypass(target.host):
        return ""
    return (
        f" (the variable {found}_proxy routes it through {proxies[found]}; "
        f"set no_proxy={target.host} to connect directly)"
    )
