# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of one node on loopback, from the environment that `make ray` makes."""

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
BIN = ROOT / "build" / "ray" / "bin"
OBJECT_STORE_BYTES = 100_000_000
SECONDS = 120  # for anything that is waited for


@dataclass(frozen=True)
class RayCluster:
    """Addresses of a cluster that runs, and the environment for commands that use it."""

    dashboard: str
    url: str
    environment: dict[str, str]
    folder: Path

    def run(self, *command: str) -> subprocess.CompletedProcess:
        """A command of the environment with Ray, its output captured."""
        program, *arguments = command
        return subprocess.run(
            [str(BIN / program), *arguments],
            capture_output=True,
            text=True,
            env=self.environment,
            cwd=ROOT,
            timeout=240,
        )

    def replicas(self) -> list[int]:
        """Processes of the engines that take requests."""
        applications = _json(f"{self.dashboard}/api/serve/applications/")["applications"]
        return [
            replica["pid"]
            for application in applications.values()
            for replica in _engine(application)["replicas"]
            if replica["state"] == "RUNNING"
        ]

    def log(self, pid: int) -> str:
        """What a worker process has printed."""
        logs = self.folder.glob(f"ray/session_latest/logs/worker-*-{pid}.*")
        return "".join(log.read_text() for log in logs)


@contextmanager
def started(num_cpus: int) -> Generator[RayCluster]:
    """A cluster with Ray Serve's HTTP proxy; all its processes end with the block."""
    dashboard, gcs, http = (free_port() for _ in range(3))
    with tempfile.TemporaryDirectory() as name:  # short: Ray makes sockets below it
        folder = Path(name)
        environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_ADDRESS": f"127.0.0.1:{gcs}",
            "RAY_TMPDIR": name,
        }
        command = [
            str(BIN / "ray"),
            "start",
            "--head",
            "--block",
            "--disable-usage-stats",
            "--node-ip-address",
            "127.0.0.1",
        ]
        command += ["--port", str(gcs), "--dashboard-port", str(dashboard), "--num-cpus", str(num_cpus)]
        command += ["--min-worker-port", "0", "--max-worker-port", "0"]  # any that is free
        command += ["--object-store-memory", str(OBJECT_STORE_BYTES)]
        cluster = RayCluster(f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{http}", environment, folder)
        with (folder / "ray.log").open("w") as log:
            head = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            wait_until(lambda: _json(f"{cluster.dashboard}/api/version"))
            cluster.run("serve", "start", "--http-port", str(http), "--proxy-location", "HeadOnly").check_returncode()
            yield cluster
        finally:
            _end(head)


def wait_until(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    """Returns when `condition` holds. Raises TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.2)
    raise TimeoutError(f"not after {seconds} s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def _engine(application: dict[str, Any]) -> dict[str, Any]:
    (engine,) = (found for name, found in application["deployments"].items() if name.startswith("LLMServer"))
    return engine


def _end(head: subprocess.Popen) -> None:
    """Ends Ray and whatever it started; it takes half a minute to do so itself."""
    for pid in psutil.pids():
        with suppress(ProcessLookupError):
            if os.getsid(pid) == head.pid:
                os.kill(pid, signal.SIGKILL)
    head.wait()
