# SPDX-License-Identifier: Apache-2.0
"""Checkpoint reading: expert tensor names, shapes, fingerprint."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.fingerprint import fingerprint
from heapr_vllm.formats.names import ExpertTensor, natural_order


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.experts.11.gate_proj.weight", ("model.layers.3.mlp.experts", 11, "w1")),
        ("model.layers.3.mlp.experts.11.up_proj.weight", ("model.layers.3.mlp.experts", 11, "w3")),
        ("model.layers.3.mlp.experts.11.down_proj.weight", ("model.layers.3.mlp.experts", 11, "w2")),
        ("model.layers.0.block_sparse_moe.experts.2.w3.weight", ("model.layers.0.block_sparse_moe.experts", 2, "w3")),
        ("model.layers.0.mlp.experts.gate_up_proj", ("model.layers.0.mlp.experts", None, "w13")),
        ("model.layers.0.mlp.experts.down_proj", ("model.layers.0.mlp.experts", None, "w2")),
        ("model.layers.0.mlp.shared_experts.gate_proj.weight", None),
        ("model.layers.0.mlp.shared_expert.down_proj.weight", None),
        ("model.layers.0.mlp.gate.weight", None),
        ("model.layers.0.mlp.experts.1.gate_proj.weight_scale", None),
    ],
)
def test_expert_tensor_names(name: str, expected: tuple | None) -> None:
    assert ExpertTensor.parse(name) == (ExpertTensor(*expected) if expected else None)


def copy(source: Path, target: Path, edit) -> Checkpoint:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.resolve(target)


def test_shapes_and_fingerprint(qwen3: Path, tmp_path: Path) -> None:
    base = Checkpoint.resolve(qwen3)
    assert base.expert_shapes() == {f"model.layers.{i}.mlp.experts": (8, 64) for i in range(3)}
    same = copy(qwen3, tmp_path / "tuned", lambda t: t["model.layers.0.mlp.experts.0.up_proj.weight"].mul_(2))
    assert fingerprint(same) == fingerprint(base), "expert values are not part of it"
    other = copy(qwen3, tmp_path / "other", lambda t: t["model.layers.2.mlp.gate.weight"].mul_(2))
    assert fingerprint(other) != fingerprint(base), "router values are"


def test_missing_expert_tensor_is_named(qwen3: Path, tmp_path: Path) -> None:
    broken = copy(qwen3, tmp_path / "broken", lambda t: t.pop("model.layers.1.mlp.experts.5.down_proj.weight"))
    with pytest.raises(HeaprError, match=r"lacks w2 of model.layers.1.mlp.experts.5"):
        broken.expert_shapes()


def test_natural_order() -> None:
    assert sorted(["a.10.b", "a.9.b", "a.1.b"], key=natural_order) == ["a.1.b", "a.9.b", "a.10.b"]
