# SPDX-License-Identifier: Apache-2.0
"""Starts `vllm serve` and stops it again; measures with `vllm bench throughput`."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

START_SECONDS = 1200
DEFAULT_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it a CPU engine wants most of the memory
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",  # by default idle connections drop after 5 s
}
VLLM = str(Path(sys.executable).with_name("vllm"))


class Server(NamedTuple):
    """A `vllm serve` that was started."""

    command: list[str]
    process: subprocess.Popen
    port: int
    log: Path

    def wait(self) -> str:
        """Its base URL, once it answers. Raises RuntimeError with the end of the log if it does not come up."""
        deadline = time.time() + START_SECONDS
        while time.time() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return f"http://127.0.0.1:{self.port}"
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        ended = f"ended with status {self.process.returncode}" if self.process.returncode is not None else "is not up"
        raise RuntimeError(f"{' '.join(self.command)} {ended}; {self.log} ends:\n{self.log.read_text()[-4000:]}")


@contextmanager
def started(model: str | Path, *arguments: str, log: Path, plugins: str | None = None) -> Generator[Server]:
    """A `vllm serve MODEL ARGUMENTS` that may not answer yet and is stopped afterwards; output goes to `log`.

    `plugins` is VLLM_PLUGINS: "" for stock vLLM, None for all installed plugins.
    """
    port = _free_port()
    command = [VLLM, "serve", str(model), "--port", str(port), *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(plugins, arguments),
            start_new_session=True,
        )
        try:
            yield Server(command, process, port, log)
        finally:
            _stop(process)


@contextmanager
def serve(model: str | Path, *arguments: str, log: Path, plugins: str | None = None) -> Generator[str]:
    """The base URL of a server that answers, arguments as for `started`. Raises RuntimeError if it does not come up."""
    with started(model, *arguments, log=log, plugins=plugins) as server:
        yield server.wait()


def throughput(
    model: str | Path,
    *arguments: str,
    log: Path,
    plugins: str | None,
    num_prompts: int,
    input_len: int,
    output_len: int,
) -> float:
    """Output tokens/s of `vllm bench throughput` with random prompts; its output goes to `log`."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [
            VLLM,
            "bench",
            "throughput",
            "--model",
            str(model),
            "--dataset-name",
            "random",
            "--num-prompts",
            str(num_prompts),
            "--random-input-len",
            str(input_len),
            "--random-output-len",
            str(output_len),
            "--output-json",
            str(result),
            *arguments,
        ]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            done = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=_environment(plugins, arguments)
            )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-4000:]}")
        return num_prompts * output_len / json.loads(result.read_text())["elapsed_time"]


def _environment(plugins: str | None, arguments: Sequence[str]) -> dict[str, str]:
    environment = {**DEFAULT_ENVIRONMENT, **os.environ} | ({} if plugins is None else {"VLLM_PLUGINS": plugins})
    if "--kv-cache-memory-bytes" in arguments:
        del environment["VLLM_CPU_KVCACHE_SPACE"]  # which would overrule it
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _stop(process: subprocess.Popen) -> None:
    """Ends the server and the engine processes it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
