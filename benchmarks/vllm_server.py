# SPDX-License-Identifier: Apache-2.0
"""Starts `vllm serve` and stops it again; measures with `vllm bench serve` and `vllm bench throughput`."""

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

START_SECONDS = 1200
DEFAULT_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it a CPU engine wants most of the memory
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",  # by default idle connections drop after 5 s, under the benchmark client
}
VLLM = str(Path(sys.executable).with_name("vllm"))


@contextmanager
def serve(model: str | Path, *arguments: str, log: Path, plugins: str | None = None) -> Iterator[str]:
    """Yields the base URL of a `vllm serve MODEL ARGUMENTS` that answers; output goes to `log`.

    `plugins` is VLLM_PLUGINS: "" for stock vLLM, None for all installed plugins. Raises RuntimeError with the end of
    the log if the server does not come up.
    """
    port = _free_port()
    command = [VLLM, "serve", str(model), "--port", str(port), *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=_environment(plugins), start_new_session=True
        )
        try:
            _wait_until_healthy(process, port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            _stop(process)


def bench(
    url: str, model: str | Path, *, concurrency: int, num_prompts: int, input_len: int, output_len: int
) -> dict[str, float]:
    """Result of `vllm bench serve` with random prompts: `output_throughput` in tokens/s, `mean_ttft_ms`, ..."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            VLLM,
            "bench",
            "serve",
            "--base-url",
            url,
            "--model",
            str(model),
            "--dataset-name",
            "random",
            "--random-input-len",
            str(input_len),
            "--random-output-len",
            str(output_len),
            "--ignore-eos",
            "--num-prompts",
            str(num_prompts),
            "--max-concurrency",
            str(concurrency),
            "--num-warmups",
            str(concurrency),
            "--seed",
            "0",
            "--disable-tqdm",
            "--save-result",
            "--result-dir",
            folder,
            "--result-filename",
            "result.json",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        result = json.loads((Path(folder) / "result.json").read_text())
    if result["completed"] != num_prompts:
        raise RuntimeError(f"only {result['completed']} of {num_prompts} requests completed")
    return result


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
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=_environment(plugins))
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-4000:]}")
        return num_prompts * output_len / json.loads(result.read_text())["elapsed_time"]


def alternate(arms: dict[str, tuple[str, str | Path]], rounds: int, **load: int) -> dict[str, list[float]]:
    """Output tokens/s per round of every arm, name to (URL, model), asked in turn and in alternating order."""
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms)[:: -1 if number % 2 else 1]:
            speeds[name].append(bench(*arms[name], **load)["output_throughput"])
        latest = ", ".join(f"{name} {values[-1]:.0f}" for name, values in speeds.items())
        print(f"{load['concurrency']} at once, round {number + 1}: {latest} tokens/s", file=sys.stderr, flush=True)
    return speeds


def _environment(plugins: str | None) -> dict[str, str]:
    return {**DEFAULT_ENVIRONMENT, **os.environ} | ({} if plugins is None else {"VLLM_PLUGINS": plugins})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_healthy(process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.time() + START_SECONDS
    while time.time() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"vllm serve did not come up:\n{log.read_text()[-4000:]}")


def _stop(process: subprocess.Popen) -> None:
    """Ends the server and the engine processes it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
