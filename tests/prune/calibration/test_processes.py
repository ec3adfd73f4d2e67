# SPDX-License-Identifier: Apache-2.0
"""Calibration by two processes under torchrun equals that of one, in memory and streamed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune import CalibrationSettings, NeuronMoments
from heapr_vllm.prune.calibration.calibrate import calibrate
from heapr_vllm.prune.calibration.moments import NORMS, OUTPUTS, SUMS
from heapr_vllm.prune.calibration.processes import Processes
from heapr_vllm.prune.text.samples import Samples


@pytest.mark.parametrize(("stream", "is_mix"), [(False, False), (False, True), (True, True)])
def test_two_processes_equal_one(stream: bool, is_mix: bool, qwen3: Path, corpus: Path, tmp_path: Path) -> None:
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
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "heapr_vllm",
        "calibrate",
        str(qwen3),
        "--dataset",
        *dataset,
        "-o",
        str(tmp_path / "two"),
        "--num-calibration-samples",
        "5",
        "--max-seq-length",
        "64",
        *(["--stream"] if stream else []),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wrote ") == 1
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
