# SPDX-License-Identifier: Apache-2.0
"""Calibration: independence of the batch size, resume after a kill, no traces in the model."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune import CalibrationSettings, NeuronMoments, collect_moments
from heapr_vllm.prune.calibration.calibrate import calibrate
from heapr_vllm.prune.calibration.dry_run import plan
from heapr_vllm.prune.calibration.mix_collector import MixCollector
from heapr_vllm.prune.calibration.moments import ALL, MOMENTS_FILE, NORMS, OUTPUTS, SUMS
from heapr_vllm.prune.calibration.record import CALIBRATION_FILE
from heapr_vllm.prune.calibration.saved_state import PARTIAL_FILE


@pytest.fixture
def model(qwen3: Path):
    return AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)


def random_blocks(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 48), generator=torch.Generator().manual_seed(3))


def test_result_does_not_depend_on_batch_size(model) -> None:
    blocks = random_blocks(6)
    one, four = collect_moments(model, blocks, 1), collect_moments(model, blocks, 4)
    for prefix in one.tokens:
        assert torch.equal(one.tokens[prefix], four.tokens[prefix])
        for name in (*SUMS, *OUTPUTS, *NORMS):
            torch.testing.assert_close(getattr(one[prefix], name), getattr(four[prefix], name), rtol=1e-5, atol=0)


def test_model_is_left_as_it_was(model) -> None:
    before = {name: (p.requires_grad, p.grad, p.clone()) for name, p in model.named_parameters()}
    model.train()
    implementation = model.get_experts_implementation()
    collect_moments(model, random_blocks(1))
    assert model.get_experts_implementation() == implementation
    assert all(module.training for module in model.modules()) and not model.is_gradient_checkpointing
    for name, parameter in model.named_parameters():
        requires_grad, grad, value = before[name]
        assert parameter.requires_grad == requires_grad and parameter.grad is grad and torch.equal(parameter, value)


def test_nan_weights_are_reported(model) -> None:
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(HeaprError, match="loss is nan at sample 0; try --dtype float32"):
        collect_moments(model, random_blocks(1))


@pytest.mark.long
def test_killed_run_resumes_to_the_same_bytes(qwen3: Path, corpus: Path, tmp_path: Path) -> None:
    settings = CalibrationSettings(model=str(qwen3), dataset=str(corpus), num_calibration_samples=40, max_seq_length=64)
    calibrate(settings, tmp_path / "whole")
    command = [
        sys.executable,
        "-m",
        "heapr_vllm",
        "calibrate",
        str(qwen3),
        "--dataset",
        str(corpus),
        "-o",
        str(tmp_path / "killed"),
        "--num-calibration-samples",
        "40",
        "--max-seq-length",
        "64",
        "--checkpoint-every",
        "1",
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "killed" / PARTIAL_FILE).exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "killed" / MOMENTS_FILE).exists()
    with pytest.raises(HeaprError, match="started with another dataset_fingerprint, seed"):
        calibrate(replace(settings, seed=1, num_calibration_samples=40), tmp_path / "killed", resume=True)
    assert subprocess.run([*command, "--resume"], stderr=subprocess.DEVNULL).returncode == 0
    assert (tmp_path / "killed" / MOMENTS_FILE).read_bytes() == (tmp_path / "whole" / MOMENTS_FILE).read_bytes()
    assert not (tmp_path / "killed" / PARTIAL_FILE).exists()


def test_partial_state_of_an_older_version_is_not_continued(model) -> None:
    collector = MixCollector(model, [ALL])
    moments = collect_moments(model, random_blocks(1), collector=collector)
    lacking = {prefix: replace(layer, routed_norm=None, peak_norm=None) for prefix, layer in moments.layers.items()}
    with pytest.raises(HeaprError, match="resuming needs routed_norm, peak_norm, .* calibrate again"):
        collector.restore(NeuronMoments.of_sources({ALL: lacking}, {}))


def test_provenance_is_recorded(calibration: Path) -> None:
    record = json.loads((calibration / CALIBRATION_FILE).read_text())
    assert record["calibration_tokens"] == 6 * 64 and record["seed"] == 0
    assert record["dataset_fingerprint"].startswith("sha256:") and record["base_fingerprint"].startswith("routers:")
    assert record["checkpoint_bytes"] > record["routed_bytes"] == 4 * record["routed_weights"]
    assert record["routed_weights"] == 3 * 8 * 64 * 3 * 64
    assert record["versions"]["torch"] and record["wall_time_seconds"] >= 0
    moments = NeuronMoments.from_pretrained(calibration)
    assert record["tokens"] == {prefix: count.tolist() for prefix, count in moments.tokens.items()}


def test_dry_run_counts_by_formula(qwen3: Path, corpus: Path) -> None:
    sizes = plan(CalibrationSettings(model=str(qwen3), dataset=str(corpus), max_seq_length=64))
    assert sizes["neurons"] == 3 * 8 * 64 and sizes["moe_layers"] == 3
    assert sizes["weight_bytes"] == sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(qwen3).parameters())


def test_a_result_counts_once_its_record_is_there(qwen3: Path, corpus: Path, tmp_path: Path) -> None:
    """Stopped between the two files, a run is not finished, and nothing reads the moments with another run's record."""
    settings = CalibrationSettings(model=str(qwen3), dataset=str(corpus), num_calibration_samples=2, max_seq_length=32)
    calibrate(settings, tmp_path / "calib")
    record, moments = (tmp_path / "calib" / name for name in (CALIBRATION_FILE, MOMENTS_FILE))
    written = moments.read_bytes()
    record.unlink()
    moments.write_bytes(b"")
    calibrate(settings, tmp_path / "calib", resume=True)
    assert record.is_file() and moments.read_bytes() == written
