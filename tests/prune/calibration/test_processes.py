# SPDX-License-Identifier: Apache-2.0
"""Calibration by two processes under torchrun equals that of one, in memory and streamed."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune import CalibrationSettings, NeuronMoments
from heapr_vllm.prune.calibration.calibrate import calibrate
from heapr_vllm.prune.calibration.moments import NORMS, OUTPUTS, SUMS
from heapr_vllm.prune.calibration.processes import Processes
from heapr_vllm.prune.text.samples import Samples

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[3]

ONE_NODE = [("--standalone", "--nproc-per-node", "2")]
SETTINGS = ("--num-calibration-samples", "5", "--max-seq-length", "64")


@pytest.mark.parametrize(
    ("nodes", "stream", "is_mix"), [(1, False, False), (1, False, True), (1, True, True), (2, False, False)]
)
def test_two_processes_equal_one(
    nodes: int, stream: bool, is_mix: bool, qwen3: Path, corpus: Path, tmp_path: Path
) -> None:
    dataset = [f"first={corpus}:0.6", f"second={corpus}:0.4"] if is_mix else [str(corpus)]
    alone = calibrate(
        CalibrationSettings(
            model=str(qwen3),
            dataset=dataset if is_mix else dataset[0],
            num_calibration_samples=5,
            max_seq_length=64,
            stream=stream,
        ),
        tmp_path / "alone",
    )
    command = [
        "calibrate",
        str(qwen3),
        "--dataset",
        *dataset,
        "-o",
        "two",
        *SETTINGS,
        *(["--stream"] if stream else []),
    ]
    results = torchrun(ONE_NODE if nodes == 1 else two_nodes(), command, [tmp_path] * nodes)
    assert [result.returncode for result in results] == [0] * nodes, results
    assert "".join(result.stdout for result in results).count("wrote ") == 1
    two = NeuronMoments.from_pretrained(tmp_path / "two")
    assert two.metadata == alone.metadata | {"processes": 2}
    assert two.sources.keys() == alone.sources.keys()
    for source, layers in alone.sources.items():
        for prefix, layer in layers.items():
            found = two.sources[source][prefix]
            assert torch.equal(found.tokens, layer.tokens)
            for name in (*SUMS, *OUTPUTS, *NORMS):  # the file holds float32, the sums were float64
                torch.testing.assert_close(getattr(found, name), getattr(layer, name).float(), rtol=1e-6, atol=0)
    names = {path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*")}
    assert {path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*")} == names


@pytest.mark.parametrize("shares_text", [True, False])
def test_nodes_that_do_not_share_what_they_must(shares_text: bool, qwen3: Path, corpus: Path, tmp_path: Path) -> None:
    """Two nodes without a common file system are two folders here; each has its own text, or the same."""
    lines = corpus.read_text().splitlines(keepends=True)
    texts = {tmp_path / "a": lines, tmp_path / "b": lines if shares_text else lines[::-1]}
    for folder, text in texts.items():
        folder.mkdir()
        (folder / "text.jsonl").write_text("".join(text))
    command = ["calibrate", str(qwen3), "--dataset", "text.jsonl", "-o", "out", *SETTINGS]
    results = torchrun(two_nodes(), command, list(texts))
    message = "process 1 " + ("does not see" if shares_text else "has another dataset_fingerprint than process 0")
    for result in results:
        assert result.returncode != 0 and f"heapr: error: {message}" in result.stderr
    assert all({path.name for path in folder.iterdir()} == {"text.jsonl"} for folder in texts), "nothing is left"


def two_nodes() -> list[tuple[str, ...]]:
    """Options of the two torchruns that two nodes would start, both on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "calibration")
    return [("--nnodes", "2", "--nproc-per-node", "1", *rendezvous, "--local-addr", "127.0.0.1")] * 2


def torchrun(
    nodes: list[tuple[str, ...]], command: list[str], folders: list[Path]
) -> list[subprocess.CompletedProcess]:
    """Runs a command of heapr by one torchrun per node, all at once, each in its folder."""

    def run(options: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess:
        launch = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "heapr_vllm", *command]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(launch, capture_output=True, text=True, timeout=600, cwd=folder, env=environment)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(run, nodes, folders))


def test_shares_cover_every_sample_once() -> None:
    blocks = Samples.equal(torch.arange(14).view(7, 2))
    shares = [Processes(rank=rank, size=3).share(blocks) for rank in range(3)]
    found = torch.cat([sample.ids for share in shares for sample in share.entries])
    assert sorted(found.tolist()) == list(range(14))
    with pytest.raises(HeaprError, match="8 processes cannot share 7 samples; start 7"):
        Processes(rank=0, size=8).share(blocks)


def test_devices() -> None:
    assert Processes(rank=3, size=4, local_rank=1).device("cuda") == "cuda:1" and Processes().device("cuda") == "cuda"
    with pytest.raises(HeaprError, match="with torchrun use --device cuda"):
        Processes(rank=0, size=2).device("auto")


def test_device_auto_loads_through_accelerate(qwen3: Path, corpus: Path, tmp_path: Path) -> None:
    settings = CalibrationSettings(model=str(qwen3), dataset=str(corpus), num_calibration_samples=2, max_seq_length=32)
    auto, cpu = (calibrate(settings, tmp_path / device, device=device) for device in ("auto", "cpu"))
    assert all(torch.equal(auto[prefix].fisher, layer.fisher) for prefix, layer in cpu.layers.items())
