"""`outbox health`: a probe as a command, for health checks that can run nothing but a command."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

import typer

from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.output import Output, OutputFormat, print_json
from outbox_server.cli.terminal import say

_LIMIT_S: Final = 5.0

app = typer.Typer(add_completion=False)


class HealthProbe(StrEnum):
    """The names that a health port answers."""

    READINESS = "readiness"
    LIVENESS = "liveness"


@app.command()
def health(
    probe: Annotated[HealthProbe, typer.Argument(help="What to ask for.")] = HealthProbe.READINESS,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="HOST:PORT",
            help="A service's health port (default: OUTBOX_HEALTH_LISTEN).",
        ),
    ] = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Ask a service on its health port whether it is ready, or alive. Exit code 0 means yes.

    If it is not ready, the second line says which store is in trouble.

    A kubelet can ask by itself (a gRPC probe of the port), which costs less than a
    command. `outbox up` opens no health port.

    $ OUTBOX_HEALTH_LISTEN=127.0.0.1:50060 outbox health liveness
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from outbox_server.cli.addresses import reachable
    from outbox_server.shared.rpc.probes import REASON_KEY
    from outbox_server.shared.settings import load_settings

    address = server or reachable(load_settings().health_listen)
    if not address:
        raise CommandFailed("set OUTBOX_HEALTH_LISTEN or --server to a service's health port")
    with grpc.insecure_channel(address) as channel:
        try:
            answer, call = health_pb2_grpc.HealthStub(channel).Check.with_call(
                health_pb2.HealthCheckRequest(service=probe), timeout=_LIMIT_S
            )
        except grpc.RpcError as error:
            raise CommandFailed(
                f"{address} does not answer the probe ({error.code().name}): the process hangs or "
                "does not run, or it is not its OUTBOX_HEALTH_LISTEN"
            ) from None
    state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    reason = dict(call.trailing_metadata()).get(REASON_KEY, "")
    if output is OutputFormat.JSON:
        print_json({"probe": probe.value, "state": state, "reason": reason})
    else:
        say(state)
        if reason:
            say(reason)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise typer.Exit(1)
