# SPDX-License-Identifier: Apache-2.0
"""Streamed calibration: the moments of the in-memory path, resumed after any step, within the predicted memory."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune import CalibrationSettings, NeuronMoments, collect_moments
from heapr_vllm.prune.calibration.calibrate import calibrate
from heapr_vllm.prune.calibration.moments import MOMENTS_FILE, NORMS, OUTPUTS, SUMS
from heapr_vllm.prune.calibration.saved_state import PARTIAL_FILE, STREAM_FOLDER
from heapr_vllm.prune.calibration.streamed import collect_moments_streamed, num_steps
from heapr_vllm.prune.models.hidden_states import ActivationStore
from heapr_vllm.prune.models.layered import LayeredModel
from tests import tiny_models


def random_blocks(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 48), generator=torch.Generator().manual_seed(3))


def assert_same(a: NeuronMoments, b: NeuronMoments, rtol: float) -> None:
    assert a.tokens.keys() == b.tokens.keys()
    for prefix in a.tokens:
        assert torch.equal(a.tokens[prefix], b.tokens[prefix]) and a.tokens[prefix].sum() > 0
        for name in (*SUMS, *OUTPUTS, *NORMS):
            torch.testing.assert_close(getattr(a[prefix], name), getattr(b[prefix], name), rtol=rtol, atol=0)


def streamed(
    checkpoint: Path, blocks: torch.Tensor, folder: Path, batch_size: int = 1, dtype: str = "auto"
) -> NeuronMoments:
    model = LayeredModel(Checkpoint.resolve(checkpoint), dtype)
    moments = collect_moments_streamed(model, blocks, ActivationStore(folder), batch_size)
    assert all(parameter.is_meta for layer in model.layers for parameter in layer.parameters())
    return moments


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "dense_between", "mixtral", "ernie4_5_moe", "qwen3_5_moe_vl"]
)
def test_moments_equal_those_of_the_whole_model(family: str, dtype: str, tmp_path: Path) -> None:
    base = tiny_models.save(family, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    blocks = random_blocks(7)
    assert_same(collect_moments(model, blocks, 3), streamed(base, blocks, tmp_path / "s", 3, dtype), rtol=1e-6)
    assert not any((tmp_path / "s").iterdir()), "hidden states are left over"


def test_stacked_experts_in_several_shards(qwen3: Path, tmp_path: Path) -> None:
    """Checkpoints store experts one by one or stacked, and a layer may be spread over shards."""
    whole = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    shutil.copytree(qwen3, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    state = {name: tensor.contiguous() for name, tensor in whole.state_dict().items()}
    assert state["model.layers.0.mlp.experts.gate_up_proj"].dim() == 3
    weight_map = {name: f"{number % 2}.safetensors" for number, name in enumerate(state)}
    for shard in set(weight_map.values()):
        save_file({name: state[name] for name in state if weight_map[name] == shard}, tmp_path / "base" / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    blocks = random_blocks(2)
    assert_same(collect_moments(whole, blocks), streamed(tmp_path / "base", blocks, tmp_path / "s"), rtol=1e-6)


def test_long_sequences_go_through_the_head_in_parts(qwen3: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("heapr_vllm.prune.models.layered.HEAD_TOKENS", 10)
    whole, blocks = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32), random_blocks(3)
    assert_same(collect_moments(whole, blocks, 3), streamed(qwen3, blocks, tmp_path / "s", 3), rtol=1e-4)


def test_stopped_after_any_step_resumes_to_the_same_bytes(tmp_path: Path, corpus: Path, monkeypatch) -> None:
    base = tiny_models.save("dense_between", tmp_path / "base")
    settings = CalibrationSettings(
        model=str(base), dataset=str(corpus), num_calibration_samples=3, max_seq_length=32, batch_size=2, stream=True
    )
    calibrate(settings, tmp_path / "whole", checkpoint_every=2)
    wanted = (tmp_path / "whole" / MOMENTS_FILE).read_bytes()
    steps = num_steps(LayeredModel(Checkpoint.resolve(base)), 2)
    real, left, saved = ActivationStore.save, 0, 0

    def save_or_stop(self, *args) -> None:
        nonlocal left, saved
        if left == 0:
            raise KeyboardInterrupt
        left, saved = left - 1, saved + 1
        real(self, *args)

    monkeypatch.setattr(ActivationStore, "save", save_or_stop)
    for done in range(steps - 2):  # the lowest layer saves no gradient
        output, left = tmp_path / f"stopped{done}", done
        with pytest.raises(KeyboardInterrupt):
            calibrate(settings, output, checkpoint_every=2)
        left, saved = -1, 0
        calibrate(settings, output, checkpoint_every=2, resume=True)
        assert saved <= steps - 2 - done + 1, "more was repeated than one batch of the backward pass"
        assert (output / MOMENTS_FILE).read_bytes() == wanted
        assert not (output / PARTIAL_FILE).exists() and not (output / STREAM_FOLDER).exists()


def test_resume_insists_on_the_same_settings_and_finishes_once(qwen3: Path, corpus: Path, tmp_path: Path) -> None:
    settings = CalibrationSettings(
        model=str(qwen3), dataset=str(corpus), num_calibration_samples=2, max_seq_length=32, stream=True
    )
    calibrate(settings, tmp_path / "c")
    written = (tmp_path / "c" / MOMENTS_FILE).stat().st_mtime_ns
    calibrate(settings, tmp_path / "c", resume=True)
    assert (tmp_path / "c" / MOMENTS_FILE).stat().st_mtime_ns == written
    with pytest.raises(HeaprError, match="started with another stream; repeat the original command"):
        calibrate(replace(settings, stream=False), tmp_path / "c", resume=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"),
            "lacks weights of model.layers.1.self_at",
        ),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight is \[3\]"),
        (
            lambda tensors: tensors["model.norm.weight"].fill_(torch.nan),
            "the loss is nan at sample 0; try --dtype float32",
        ),
    ],
)
def test_bad_weights_leave_nothing_behind(damage, message: str, qwen3: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen3, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    settings = CalibrationSettings(
        model=str(tmp_path / "base"), dataset=str(corpus), num_calibration_samples=2, max_seq_length=32, stream=True
    )
    with pytest.raises(HeaprError, match=message):
        calibrate(settings, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_streams_on_one_device(qwen3: Path) -> None:
    with pytest.raises(HeaprError, match="one layer at a time on one device; use --device cuda or cpu"):
        LayeredModel(Checkpoint.resolve(qwen3), device="auto")
