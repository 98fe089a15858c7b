"""Runs the pods of rendered manifests as processes, as a kubelet starts their containers.

Arguments, variables, volumes and probes come from the manifest. Each process is process 1 of its
namespace, has no capabilities, and sees a read-only root file system with its volumes mounted. Only
the ports differ, because all pods share this machine's network.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from outbox_server.deploy.ports import free_port
from tests.eventually import PATIENCE, eventually

ROOT: Final = Path(__file__).parents[2]
BIN: Final = Path(sys.executable).parent
PORTS: Final = (50051, 50052, 50053, 50060, 9090)
# The paths in /etc that programs read. The rest is hidden so that volumes can be mounted there.
_ETC: Final = "group hosts ld.so.cache nsswitch.conf passwd ssl"
_MOUNTING: Final = f"""
set -eu
mkdir "$1/etc"
(cd /etc && cp -a {_ETC} "$1/etc")
mount --make-rprivate /
mount -t tmpfs none /run
mount --bind "$1/etc" /etc
shift
while [ "$1" != -- ]; do mkdir -p "$2"; mount --bind "$1" "$2"; shift 2; done
shift
mount -o remount,ro,bind /etc
mount -o remount,ro,bind /
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""
_STATES: Final = health_pb2.HealthCheckResponse.ServingStatus

Resource = dict[str, Any]


class Pod:
    """One container of a rendered workload or job, as a process."""

    def __init__(
        self,
        template: Resource,
        config: Mapping[str, Mapping[str, str]],
        secrets: Mapping[str, Mapping[str, str]],
        folder: Path,
    ) -> None:
        """`config` and `secrets` are the ConfigMaps and Secrets of the namespace, by name."""
        self._spec = template["spec"]
        (self.container,) = self._spec["containers"]
        self.ports = {port: free_port() for port in PORTS}
        self._config, self._secrets, self._folder = config, secrets, folder
        self._log = folder / "log"
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the container's process."""
        folder = self._folder
        folder.mkdir(parents=True)
        volumes = {one["name"]: self._volume(one) for one in self._spec["volumes"] or ()}
        mounts: list[str | Path] = []
        for mount in self.container["volumeMounts"] or ():
            mounts += [volumes[mount["name"]], mount["mountPath"]]
        (entry,) = json.loads(_entry_point())
        with self._log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *("unshare", "--mount", "--pid", "--fork", "sh", "-c", _MOUNTING, "sh", folder),
                *mounts,
                "--",
                BIN / entry,
                *self.container["args"],
                env={"PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", **self.environment()},
                cwd="/",
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
            )

    def environment(self) -> dict[str, str]:
        """The variables of the container."""
        found: dict[str, str] = {}
        for source in self.container.get("envFrom", ()):
            found |= self._config[source["configMapRef"]["name"]]
        for one in self.container["env"]:
            if "valueFrom" in one:
                source = one["valueFrom"]["secretKeyRef"]
                found[one["name"]] = self._secrets[source["name"]][source["key"]]
            else:
                found[one["name"]] = one["value"]
        return {name: self._with_own_ports(value) for name, value in found.items()}

    async def probe(self, kind: str) -> str:
        """Return the result of `startupProbe`, `livenessProbe` or `readinessProbe`."""
        probe = self.container[kind]
        address = f"127.0.0.1:{self.ports[probe['grpc']['port']]}"
        request = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
        async with grpc.aio.insecure_channel(
            address, [("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            try:
                answer = await health_pb2_grpc.HealthStub(channel).Check(
                    request, timeout=probe["timeoutSeconds"]
                )
            except grpc.aio.AioRpcError as error:
                return error.code().name
        return str(_STATES.Name(answer.status))

    async def until_passed(self, kind: str) -> None:
        """Wait until a probe passes."""

        async def passed() -> bool:
            assert self.process is not None
            assert self.process.returncode is None, self.log
            return await self.probe(kind) == "SERVING"

        await eventually(passed)

    async def pre_stop(self) -> None:
        """Run the preStop hook in the container, as a kubelet does before SIGTERM."""
        hook = self.container["lifecycle"]["preStop"]["exec"]["command"]
        ran = await asyncio.create_subprocess_exec(
            *("nsenter", "--target", str(self.process_one()), "--mount", "--pid", *hook)
        )
        assert await ran.wait() == 0

    async def terminate(self) -> int:
        """Send SIGTERM to process 1, and return the exit code."""
        assert self.process is not None
        os.kill(self.process_one(), signal.SIGTERM)
        return await self.wait()

    def process_one(self) -> int:
        """Return the id of the container's process in the namespace of the tests."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(children.read_text(encoding="ascii"))

    async def wait(self) -> int:
        """Wait until the process has ended; return its exit code."""
        assert self.process is not None
        async with asyncio.timeout(PATIENCE):
            return await self.process.wait()

    @property
    def log(self) -> str:
        """The output of the container."""
        return self._log.read_text(encoding="utf-8")

    def _volume(self, volume: Resource) -> Path:
        folder = self._folder / str(volume["name"])
        folder.mkdir()
        if "secret" in volume:
            content = self._secrets[volume["secret"]["secretName"]]
            items = volume["secret"].get("items") or [{"key": key, "path": key} for key in content]
            for item in items:
                (folder / item["path"]).write_text(content[item["key"]])
        elif "configMap" in volume:
            for name, text in self._config[volume["configMap"]["name"]].items():
                (folder / name).write_text(text)
        else:
            assert "emptyDir" in volume
        return folder

    def _with_own_ports(self, value: str) -> str:
        return re.sub(
            r"^(0\.0\.0\.0|\[::\]):(\d+)$", lambda at: f"127.0.0.1:{self.ports[int(at[2])]}", value
        )


class Namespace:
    """The resources of a rendered chart and the Secrets that they use."""

    def __init__(
        self, resources: list[Resource], secrets: Mapping[str, Mapping[str, str]], folder: Path
    ) -> None:
        self._templates = dict(_templates(resources))
        self._config = {
            one["metadata"]["name"]: one["data"] for one in resources if one["kind"] == "ConfigMap"
        }
        self._secrets, self._folder, self._count = secrets, folder, 0

    @asynccontextmanager
    async def pod(self, component: str, *, server: str = "") -> AsyncIterator[Pod]:
        """Run a new pod of a component. `server` replaces its last argument, an address."""
        self._count += 1
        folder = self._folder / f"{component}-{self._count}"
        pod = Pod(self._templates[component], self._config, self._secrets, folder)
        if server:
            pod.container = {**pod.container, "args": [*pod.container["args"][:-1], server]}
        await pod.start()
        assert pod.process is not None
        try:
            yield pod
        finally:
            if pod.process.returncode is None:
                # When process 1 ends, its namespace ends.
                os.kill(pod.process_one(), signal.SIGKILL)
                await pod.process.wait()

    async def job(self, component: str, *, server: str = "") -> tuple[int, str]:
        """Run a job until it ends; return its exit code and its output."""
        async with self.pod(component, server=server) as pod:
            return await pod.wait(), pod.log


def _templates(resources: list[Resource]) -> Iterator[tuple[str, Resource]]:
    """The pod templates of a chart; for a pod with several containers, one for each."""
    for one in resources:
        if one["kind"] not in ("Deployment", "StatefulSet", "Job"):
            continue
        component = one["metadata"]["labels"]["app.kubernetes.io/component"]
        template = one["spec"]["template"]
        containers = template["spec"]["containers"]
        for container in containers:
            name = component if len(containers) == 1 else f"{component}-{container['name']}"
            yield name, {**template, "spec": {**template["spec"], "containers": [container]}}


def _entry_point() -> str:
    text = (ROOT / "deploy" / "image" / "Dockerfile").read_text(encoding="utf-8")
    return str(re.findall(r"(?m)^ENTRYPOINT (.*)$", text)[0])
