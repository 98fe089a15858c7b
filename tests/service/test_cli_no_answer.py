"""The messages of the command line when no Outbox server answers: one remedy per cause."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from outbox_server.cli.main import app
from outbox_server.deploy.certificates import Certificate, self_signed, server_context
from outbox_server.deploy.embedded.proxy import TcpProxy
from outbox_server.shared.rpc.server import GrpcServer, ServiceBinding
from outbox_server.shared.settings import load_settings
from tests.commands import run

HTTP1 = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
EMPTY_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for only half a second: the test's server never answers."""
    monkeypatch.setattr("outbox_server.cli.connection_check._LIMIT_S", 0.5)


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return self_signed(tmp_path / "server")


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def silent(stream: socket.socket) -> None:
    while stream.recv(65536):
        pass


def closing(_: socket.socket) -> None:
    pass


def saying(answer: bytes) -> Callable[[socket.socket], None]:
    def talk(stream: socket.socket) -> None:
        stream.recv(65536)
        stream.sendall(answer)
        silent(stream)

    return talk


@contextmanager
def listening(
    talk: Callable[[socket.socket], None], context: ssl.SSLContext | None = None
) -> Iterator[str]:
    """Run `talk` on each connection to the address, over TLS if a `context` is given."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        streams: list[socket.socket] = []

        def serve(stream: socket.socket) -> None:
            try:
                if context is not None:
                    stream = context.wrap_socket(stream, server_side=True)
                    streams.append(stream)
                talk(stream)
            except OSError:
                pass
            finally:
                stream.close()

        def accept() -> None:
            while True:
                try:
                    stream, _ = server.accept()
                except OSError:
                    return
                streams.append(stream)
                threading.Thread(target=serve, args=(stream,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for stream in streams:
                stream.close()


def asked(address: str, *options: str) -> str:
    """Return the line that a command prints when it calls a scheduler at `address`."""
    words = [*options, "senders", "get", "1", "--server", address]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    line = done.stderr.removeprefix("outbox: ").removesuffix("\n")
    assert "\n" not in line
    # The text never comes from a library.
    assert "last error" not in line
    assert "ipv4" not in line
    return line


CORRECTION = "name the address of the scheduler with --server"
FIX = f"start the scheduler there, or {CORRECTION}"


def test_a_host_name_that_cannot_be_resolved_is_reported() -> None:
    address = "no-such-host.invalid:50051"
    assert (
        asked(address) == f"the host name in {address} (--server) cannot be resolved: {CORRECTION}"
    )


def test_a_port_without_a_listener_is_reported() -> None:
    address = f"127.0.0.1:{closed_port()}"
    assert asked(address) == f"nothing listens at {address} (--server): {FIX}"
    assert asked(address, "--tls-ca", "system") == f"nothing listens at {address} (--server): {FIX}"


@pytest.mark.parametrize(
    ("variable", "advice"),
    [
        (None, "start `outbox up` in this folder, or name the address of the scheduler with --s"),
        (
            "set",
            "start the scheduler there, or name the address of the scheduler with OUTBOX_SCHED",
        ),
    ],
)
def test_the_advice_names_where_the_address_comes_from(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, advice: str
) -> None:
    address = f"127.0.0.1:{closed_port()}"
    if variable:
        monkeypatch.setenv("OUTBOX_SCHEDULER_LISTEN", address)
    else:
        Path(".outbox").mkdir()
        Path(".outbox/endpoints.json").write_text(json.dumps({"scheduler": address}))
    done = CliRunner().invoke(app, ["senders", "get", "1"])
    assert done.exit_code == 1
    assert advice in done.stderr


@pytest.mark.usefixtures("impatient")
def test_a_host_that_drops_packets_is_reported() -> None:
    # The queue of connections is full: further connections get no answer.
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        address = f"127.0.0.1:{server.getsockname()[1]}"
        for options in ((), ("--timeout", "100ms")):
            line = asked(address, *options)
            assert "within 0.5 s: the host is down, or a firewall drops the connection" in line


def test_a_plaintext_call_to_a_tls_server_is_reported(certificate: Certificate) -> None:
    with listening(silent, server_context(certificate)) as address:
        assert asked(address).startswith(f"{address} (--server) uses TLS: add --tls-ca FILE")


def test_a_tls_call_to_a_plaintext_server_is_reported(certificate: Certificate) -> None:
    with listening(saying(EMPTY_SETTINGS)) as address:
        line = asked(address, "--tls-ca", str(certificate.public))
        assert line == (
            f"{address} (--server) does not use TLS: leave out --tls-ca and OUTBOX_TLS_CA"
        )


async def test_tls_mismatches_with_real_servers_are_reported(certificate: Certificate) -> None:
    public, private = map(str, certificate)
    for settings, options, said in (
        ({"tls_certificate": public, "tls_key": private}, (), "uses TLS: add --tls-ca FILE"),
        ({}, ("--tls-ca", public), "does not use TLS: leave out --tls-ca"),
        (
            {"tls_certificate": public, "tls_key": private, "tls_client_ca": public},
            ("--tls-ca", public),
            "requires a client certificate; add --tls-cert FILE and --tls-key FILE",
        ),
    ):
        server = GrpcServer(load_settings(auth="off", **settings), "127.0.0.1:0", [])
        await server.start()
        try:
            line = await asyncio.to_thread(asked, f"127.0.0.1:{server.port}", *options)
        finally:
            await server.drain_and_stop(timedelta(seconds=1))
        assert said in line


async def test_a_client_certificate_of_another_ca_is_reported(
    certificate: Certificate, tmp_path: Path
) -> None:
    public, private = map(str, certificate)
    stranger = self_signed(tmp_path / "stranger")
    server = GrpcServer(
        load_settings(auth="off", tls_certificate=public, tls_key=private, tls_client_ca=public),
        "127.0.0.1:0",
        [],
    )
    await server.start()
    own = ("--tls-cert", str(stranger.public), "--tls-key", str(stranger.private))
    try:
        line = await asyncio.to_thread(asked, f"127.0.0.1:{server.port}", "--tls-ca", public, *own)
    finally:
        await server.drain_and_stop(timedelta(seconds=1))
    assert f"refuses the client certificate {stranger.public}; use one that its client CA" in line


@pytest.mark.parametrize("tls", [False, True])
def test_an_http1_server_is_reported(certificate: Certificate, tls: bool) -> None:
    options = ("--tls-ca", str(certificate.public)) if tls else ()
    with listening(saying(HTTP1), server_context(certificate) if tls else None) as address:
        assert asked(address, *options) == (
            f"{address} (--server) is an HTTP/1 server, and gRPC needs HTTP/2, so it is not "
            f"an Outbox scheduler: {CORRECTION}"
        )


def test_a_tls_call_to_a_plaintext_http1_server_is_reported(certificate: Certificate) -> None:
    with listening(saying(HTTP1)) as address:
        assert "is an HTTP/1 server" in asked(address, "--tls-ca", str(certificate.public))


@pytest.mark.usefixtures("impatient")
def test_a_server_of_another_protocol_is_quoted_without_terminal_escapes() -> None:
    with listening(saying(b"220 mail\x1b[2J ESMTP ready\r\n")) as address:
        line = asked(address)
    assert "is another kind of server (it sends '220 mail\\x1b[2J ESMTP ready" in line


def test_a_server_that_closes_each_connection_is_reported() -> None:
    with listening(closing) as address:
        assert f"{address} (--server) closes each connection at once, so it is not" in asked(
            address
        )


@pytest.mark.usefixtures("impatient")
def test_a_silent_server_is_reported() -> None:
    with listening(silent) as address:
        assert "accepts connections but sends nothing for 0.5 s, so it is not" in asked(address)


def test_a_server_that_breaks_off_http2_is_reported() -> None:
    def talk(stream: socket.socket) -> None:
        stream.recv(65536)
        stream.sendall(EMPTY_SETTINGS)

    with listening(talk) as address:
        assert (
            asked(address)
            == f"{address} (--server) closed the connection during the call; try again"
        )


def test_a_proxy_set_by_a_variable_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = f"http://127.0.0.1:{closed_port()}"
    monkeypatch.setenv("http_proxy", proxy)
    with listening(saying(EMPTY_SETTINGS)) as address:
        assert asked(address) == (
            f"{address} (--server) closed the connection during the call (the variable "
            f"http_proxy routes it through {proxy}; set no_proxy=127.0.0.1 to "
            "connect directly); try again"
        )


async def test_a_command_waits_for_a_far_server() -> None:
    async with (
        serving("outbox.v1.SenderService") as address,
        TcpProxy(lambda: int(address.rpartition(":")[2])) as proxy,
    ):
        proxy.lag(0.3)
        # It is tried once, because it may have created a sender.
        words = ["senders", "create", "--user", "u", "--email", "a@b.org"]
        done = await asyncio.to_thread(run, [*words, "--server", f"127.0.0.1:{proxy.port}"])
    assert "METHOD_NOT_FOUND" in done.stderr


def streams_begun(received: bytes) -> Iterator[bytes]:
    """Yield the number of each stream that an HTTP/2 client begins with HEADERS."""
    rest = received.partition(b"SM\r\n\r\n")[2]
    while len(rest) >= 9:
        if rest[3] == 1:
            yield rest[5:9]
        rest = rest[9 + int.from_bytes(rest[:3], "big") :]


@pytest.mark.parametrize("status", [404, 503])
def test_an_http2_server_without_grpc_is_reported(status: int) -> None:
    # A header block with `:status` only.
    headers = b"\x08\x03" + str(status).encode()

    def talk(stream: socket.socket) -> None:
        received, answered = stream.recv(65536), 0
        stream.sendall(EMPTY_SETTINGS + b"\x00\x00\x00\x04\x01\x00\x00\x00\x00")
        while more := stream.recv(65536):
            received += more
            begun = list(streams_begun(received))
            for number in begun[answered:]:
                # HEADERS that end the stream.
                stream.sendall(len(headers).to_bytes(3, "big") + b"\x01\x05" + number + headers)
            answered = len(begun)

    with listening(talk) as address:
        line = asked(address)
    if status == 404:  # gRPC reports it as UNIMPLEMENTED
        assert line.startswith(
            f"{address} (--server) is a gRPC server, but not an Outbox scheduler"
        )
    else:
        assert line.startswith(
            f"{address} (--server) answered with HTTP status {status}, so it is not"
        )


@asynccontextmanager
async def serving(*services: str) -> AsyncIterator[str]:
    """Run a server that offers the services but none of their methods."""
    added = [ServiceBinding(name, lambda _: None) for name in services]
    server = GrpcServer(load_settings(auth="off"), "127.0.0.1:0", added)
    await server.start()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.drain_and_stop(timedelta(seconds=1))


@pytest.mark.parametrize(
    ("service", "said"),
    [
        ("outbox.v1.StatsService", "is the stats service, but this command needs the scheduler"),
        ("outbox.v1.DispatcherService", "is the dispatcher, but this command needs the scheduler"),
        ("other.v1.Service", "is a gRPC server, but not an Outbox scheduler"),
    ],
)
async def test_another_service_at_the_address_is_reported(service: str, said: str) -> None:
    async with serving(service) as address:
        line = await asyncio.to_thread(asked, address)
    assert line == f"{address} (--server) {said} (METHOD_NOT_FOUND): {CORRECTION}"


async def test_a_server_older_than_the_command_is_reported() -> None:
    async with serving("outbox.v1.SenderService", "outbox.v1.StatsService") as address:
        done = await asyncio.to_thread(run, ["stats", "sender", "1", "--server", address])
    assert done.exit_code == 1
    assert (
        f"the stats service at {address} (--server) lacks the method of this command "
        "(METHOD_NOT_FOUND): it is an older version; upgrade it"
    ) in done.stderr


def test_an_untrusted_certificate_is_reported(certificate: Certificate, tmp_path: Path) -> None:
    other = self_signed(tmp_path / "other")
    with listening(silent, server_context(certificate)) as address:
        at = f"the certificate of {address} (--server)"
        assert asked(address, "--tls-ca", str(other.public)) == (
            f"{at} is not signed by the CA in {other.public}: name the right CA with "
            "--tls-ca FILE (or OUTBOX_TLS_CA)"
        )
        assert f"{at} is not signed by a CA of this" in asked(address, "--tls-ca", "system")
        name = address.replace("127.0.0.1", "localhost")
        line = asked(name, "--tls-ca", str(certificate.public))
        assert f"the certificate of {name} (--server) is not for localhost: use a host" in line


def test_an_expired_certificate_is_reported(tmp_path: Path) -> None:
    old = self_signed(tmp_path / "old", until=timedelta(minutes=-5))
    with listening(silent, server_context(old)) as address:
        line = asked(address, "--tls-ca", str(old.public))
    assert line == f"the certificate of {address} (--server) has expired: renew it on the server"


def test_files_that_are_not_certificates_are_named(
    certificate: Certificate, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("no PEM")
    public = str(certificate.public)
    with listening(silent, server_context(certificate)) as address:
        assert f"{text} (--tls-ca or OUTBOX_TLS_CA) is not a PEM file" in asked(
            address, "--tls-ca", str(text)
        )
        other = self_signed(tmp_path / "other")
        own = ("--tls-cert", public, "--tls-key", str(other.private))
        line = asked(address, "--tls-ca", public, *own)
        assert f"{public} (--tls-cert) and {other.private} (--tls-key) are not a PEM" in line


@pytest.mark.parametrize(
    "address",
    ["localhost", "50051", ":50051", "http://127.0.0.1:50051", "127.0.0.1:70000", "::1:50051"],
)
def test_an_address_that_is_not_host_and_port_is_wrong_usage(address: str) -> None:
    done = run(["senders", "get", "1", "--server", address])
    assert done.exit_code == 2
    assert f"--server: {address!r} is not HOST:PORT, such as 127.0.0.1:50051" in done.stderr


def test_a_variable_with_an_invalid_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_STATS_LISTEN", "stats.example.com")
    done = run(["stats", "sender", "1"])
    assert done.exit_code == 2
    assert "OUTBOX_STATS_LISTEN: 'stats.example.com' is not HOST:PORT" in done.stderr
