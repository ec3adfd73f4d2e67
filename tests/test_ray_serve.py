# SPDX-License-Identifier: Apache-2.0
"""Ray Serve LLM as released, on CPUs: the committed application under traffic, one of its replicas killed."""

import os
import signal
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from openai import APIError, OpenAI

from tests import ray_cluster
from tests.conftest import BUNDLED, prune
from tests.ray_cluster import RayCluster, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(not ray_cluster.BIN.exists(), reason="no environment with Ray; `make ray` makes it"),
]
APPLICATION = "serving_examples.ray_serve.application:build"
CLIENTS, NEW_TOKENS, SECONDS = 6, 128, 8
PROMPT = "def __init__(self, name):\n"


@dataclass(frozen=True)
class Request:
    """One request: when it began and ended, and what came; `text` is None where it was lost."""

    name: str
    began: float
    ended: float
    text: str | None


@dataclass
class Traffic:
    """Clients of an endpoint that ask one request after the other."""

    endpoint: OpenAI
    requests: list[Request] = field(default_factory=list)
    ends: threading.Event = field(default_factory=threading.Event)

    def ask(self) -> Request:
        name, began = uuid.uuid4().hex, time.monotonic()
        try:
            answer = self.endpoint.completions.create(
                model="pruned",
                prompt=PROMPT,
                max_tokens=NEW_TOKENS,
                temperature=0,
                extra_body={"ignore_eos": True},
                extra_headers={"X-Request-Id": name},
            )
            text = answer.choices[0].text
        except APIError:
            text = None
        return Request(name, began, time.monotonic(), text)

    def run(self) -> None:
        while not self.ends.is_set():
            self.requests.append(self.ask())


@contextmanager
def flowing(endpoint: OpenAI) -> Generator[Traffic]:
    """Traffic of CLIENTS clients; after the block all their requests have ended."""
    traffic = Traffic(endpoint)
    clients = [threading.Thread(target=traffic.run) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield traffic
    finally:
        traffic.ends.set()
        for client in clients:
            client.join()


@pytest.fixture(scope="module")
def pruned(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray_serve")
    prune(BUNDLED, corpus, folder, 0.5)
    return folder / "compact"


@pytest.fixture(scope="module")
def cluster() -> Generator[RayCluster]:
    with ray_cluster.started(num_cpus=8) as cluster:
        yield cluster


def test_replicas_scale_and_a_killed_one_loses_only_its_own_requests(cluster: RayCluster, pruned: Path) -> None:
    engine = ["dtype=float32", "max_model_len=256", "enforce_eager=true", "enable_log_requests=true"]
    settings = ["device=cpu", "max_replicas=2", "target_ongoing_requests=1", "upscale_delay_s=1", *engine]
    deployed = cluster.run("serve", "run", "--non-blocking", APPLICATION, f"model={pruned}", *settings)
    assert deployed.returncode == 0, deployed.stderr
    wait_until(lambda: len(cluster.replicas()) == 1)
    endpoint = OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60)
    expected = Traffic(endpoint).ask().text
    assert expected
    with flowing(endpoint) as traffic:
        began = time.monotonic()
        wait_until(lambda: len(cluster.replicas()) == 2)
        scaled = time.monotonic()
        time.sleep(SECONDS)
        victim, survivor = cluster.replicas()
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(set(cluster.replicas()) - {victim}) == 2)
        restored = time.monotonic()
        time.sleep(SECONDS)
    answered = [request for request in traffic.requests if request.text is not None]
    lost = [request for request in traffic.requests if request.text is None]
    in_flight = [request for request in traffic.requests if request.began < killed < request.ended]
    before, during, after = (
        between(answered, *phase) for phase in [(scaled, killed), (killed, restored), (restored, float("inf"))]
    )
    print(
        f"a second replica after {scaled - began:.1f} s; answered {before} requests in {killed - scaled:.1f} s before "
        f"the kill, {during} in {restored - killed:.1f} s until the replica was back, {after} in {SECONDS} s after; "
        f"{len(in_flight)} were in flight at the kill, {len(lost)} lost"
    )
    assert before and during and after
    assert {request.text for request in answered} == {expected}
    assert set(lost) <= set(in_flight)
    log = cluster.log(survivor)
    assert any(request.name in log for request in answered)
    assert not [request for request in lost if request.name in log], "the other replica loses none"


def between(requests: list[Request], begin: float, end: float) -> int:
    """How many of them ended in that time."""
    return sum(begin < request.ended <= end for request in requests)


def test_vllms_ray_executor_asks_for_gpus(cluster: RayCluster, pruned: Path) -> None:
    """When this fails, one engine can be spread over Ray workers on CPUs: the example's note about it can go."""
    serve = ["python", "-m", "vllm.entrypoints.cli.main", "serve", str(pruned), "--max-model-len", "256"]
    result = cluster.run(*serve, "--distributed-executor-backend", "ray", "--tensor-parallel-size", "2")
    assert result.returncode != 0
    assert "current platform cpu does not support ray" in result.stdout + result.stderr
