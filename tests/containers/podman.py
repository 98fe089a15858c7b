"""Podman with the store that `run.sh` filled, and pods that it plays from rendered manifests.

Podman 4.3 cannot do all that Kubernetes does, so a manifest is changed in these points, and in no
others:

- A StatefulSet becomes a Deployment, and a Job a Pod. A workload has one pod.
- Pods share the network of the tests, so each one has ports of its own, and declares none. The
  gateway finds the services on loopback.
- Probes are removed; the tests ask in place of a kubelet.
- A Secret belongs to one volume, because podman mounts each name only once. It has only the keys
  that are mounted, because podman ignores `items`.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from tests.eventually import PATIENCE

_FOLDER: Final = Path(__file__).parents[2] / "build" / "containers"
_COMPOSE: Final = _FOLDER / "compose" / "bin" / "podman-compose"
IMAGE: Final = "localhost/outbox:test"
# The ports of the chart.
PORTS: Final = (50051, 50052, 50053, 50060, 8080, 9090)
# Below those that Linux gives to outgoing connections, so each of them is free.
_FIRST_PORT: Final = 20_000
_COMPONENTS: Final = ("scheduler", "dispatcher", "stats", "gateway", "migrate", "operator-key")
_SERVICE: Final = re.compile(r"outbox-(scheduler|stats)-headless:(\d+)$")

Resource = dict[str, Any]


async def podman(*words: str | Path, stdin: str = "", may_fail: bool = False) -> str:
    """Run a command of podman; return its output, or with `may_fail` also that of a failure."""
    return await _run("podman", *words, stdin=stdin, may_fail=may_fail)


async def podman_compose(folder: Path, variables: Mapping[str, str], *words: str) -> str:
    """Run a command of podman-compose on the file compose.yaml in a folder."""
    return await _run(_COMPOSE, *words, folder=folder, variables=variables)


async def _run(
    program: str | Path,
    *words: str | Path,
    stdin: str = "",
    may_fail: bool = False,
    folder: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> str:
    process = await asyncio.create_subprocess_exec(
        program,
        *words,
        env={
            "PATH": os.environ["PATH"],
            "CONTAINERS_CONF": str(_FOLDER / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(_FOLDER / "storage.conf"),
            # The timers of health checks need systemd.
            "DISABLE_HC_SYSTEMD": "true",
            **(variables or {}),
        },
        cwd=folder,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(PATIENCE):
            output, _ = await process.communicate(stdin.encode())
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    text = output.decode()
    assert may_fail or process.returncode == 0, f"{program} {words}: {text}"
    return text


async def remove_everything() -> None:
    """Remove the pods, volumes and secrets of the store, also those of an earlier run."""
    await podman("pod", "rm", "--all", "--force", "--time", "0")
    await podman("volume", "rm", "--all", "--force")
    await podman("secret", "rm", "--all")


class PlayedPod:
    """The one pod of a rendered workload or job, run by `podman kube play`."""

    def __init__(
        self,
        resources: list[Resource],
        component: str,
        secrets: Mapping[str, Mapping[str, str]],
        folder: Path,
    ) -> None:
        """`secrets` are those of the namespace, by name."""
        self.component: Final = component
        self.ports: Final = {port: _port_of(component, port) for port in PORTS}
        (workload,) = [
            one
            for one in resources
            if one["metadata"]["labels"]["app.kubernetes.io/component"] == component
            and one["kind"] in ("Deployment", "StatefulSet", "Job")
        ]
        (self.rendered,) = workload["spec"]["template"]["spec"]["containers"]
        self._secrets = self._mounted(workload["spec"]["template"]["spec"], secrets)
        self._manifest = folder / f"{component}.yaml"
        documents = [self._with_own_ports(one) for one in resources if one["kind"] == "ConfigMap"]
        documents.append(self._playable(workload))
        self._manifest.write_text(yaml.safe_dump_all(documents), encoding="utf-8")
        name = workload["metadata"]["name"]
        self.container: Final = (
            f"{name}-{component}" if workload["kind"] == "Job" else f"{name}-pod-0-{component}"
        )

    async def play(self) -> None:
        """Start the pod."""
        for name, content in self._secrets.items():
            # Podman 4.3 does not decode `data`, so the values are written as they are.
            secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}}
            text = yaml.safe_dump({**secret, "data": dict(content)})
            await podman("secret", "create", name, "-", stdin=text)
        await podman("kube", "play", self._manifest)

    async def replace(self) -> None:
        """Stop the pod, remove it and start a new one, as a new release does."""
        await podman("pod", "stop", "--time", self._grace, self._pod)
        assert await self.exit_code() == 0
        await podman("kube", "play", "--replace", self._manifest)

    async def stop(self) -> int:
        """Send SIGTERM, and SIGKILL after the grace period of the chart; return the exit code."""
        await podman("stop", "--time", self._grace, self.container)
        return await self.exit_code()

    async def start(self) -> None:
        """Start the container that was stopped."""
        await podman("start", self.container)

    async def job(self) -> tuple[int, str]:
        """Run a job until it ends; return its exit code and its output."""
        await self.play()
        return int(await podman("wait", self.container)), await self.log()

    async def exit_code(self) -> int:
        """Return the exit code of the container that has ended."""
        state = json.loads(await podman("inspect", self.container))[0]["State"]
        assert state["Status"] == "exited", state
        return int(state["ExitCode"])

    async def execute(self, *words: str, may_fail: bool = False, stdin: str = "") -> str:
        """Run a command in the container; return its output."""
        return await podman("exec", "-i", self.container, *words, may_fail=may_fail, stdin=stdin)

    async def log(self) -> str:
        """Return the output of the container."""
        return await podman("logs", self.container)

    @property
    def _pod(self) -> str:
        return self.container.removesuffix(f"-{self.component}")

    @property
    def _grace(self) -> str:
        documents = list(yaml.safe_load_all(self._manifest.read_text(encoding="utf-8")))
        return str(documents[-1]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"])

    def _mounted(
        self, spec: Resource, secrets: Mapping[str, Mapping[str, str]]
    ) -> dict[str, dict[str, str]]:
        found = {}
        for volume in spec["volumes"] or ():
            if "secret" in volume:
                name = volume["secret"]["secretName"]
                items = volume["secret"].get("items") or [{"key": key} for key in secrets[name]]
                keys = [item["key"] for item in items]
                found[self._own_name(volume)] = {key: secrets[name][key] for key in keys}
        return found

    def _own_name(self, volume: Resource) -> str:
        return f"{volume['secret']['secretName']}-{self.component}-{volume['name']}"

    def _playable(self, workload: Resource) -> Resource:
        made = copy.deepcopy(workload)
        spec = made["spec"]["template"]["spec"]
        spec["hostNetwork"] = True
        (container,) = spec["containers"]
        container["image"] = IMAGE
        container["args"] = [self._own_port(word) for word in container["args"]]
        for field in ("ports", "startupProbe", "livenessProbe", "readinessProbe"):
            container.pop(field, None)
        for volume in spec["volumes"] or ():
            if "secret" in volume:
                volume["secret"]["secretName"] = self._own_name(volume)
                volume["secret"].pop("items", None)
                # Podman 4.3 crashes where this is not set.
                volume["secret"]["optional"] = False
        if workload["kind"] == "Job":
            return {"apiVersion": "v1", "kind": "Pod", "metadata": made["metadata"], "spec": spec}
        made["kind"] = "Deployment"
        for field in ("serviceName", "podManagementPolicy"):
            made["spec"].pop(field, None)
        made["spec"]["replicas"] = 1
        return made

    def _with_own_ports(self, config: Resource) -> Resource:
        data = {name: self._own_port(value) for name, value in config["data"].items()}
        return {**config, "data": data}

    def _own_port(self, value: str) -> str:
        value = _SERVICE.sub(lambda at: f"127.0.0.1:{_port_of(at[1], int(at[2]))}", value)
        return re.sub(r"(0\.0\.0\.0):(\d+)$", lambda at: f"{at[1]}:{self.ports[int(at[2])]}", value)


def _port_of(component: str, port: int) -> int:
    return _FIRST_PORT + 100 * _COMPONENTS.index(component) + PORTS.index(port)
