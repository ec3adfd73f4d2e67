# SPDX-License-Identifier: Apache-2.0
"""Experts of 4 bits while they are loaded are those of an export; everything else passes as it is."""

import random
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.reader import TensorReader
from heapr_vllm.model_executor.unpacking import unpacked
from tests import quantized_models, tiny_models


def all_of(base: Checkpoint) -> dict[str, range]:
    """As if one rank held every expert."""
    return {prefix: range(num_experts) for prefix, (num_experts, _) in base.expert_shapes().items()}


@pytest.mark.parametrize("name", ["gptq", "awq-linears", "w4a16-asymmetric", "int8-channel"])
def test_in_any_order(name: str, tmp_path: Path) -> None:
    """Of a model with a draft layer, whose experts are not pruned and stay packed."""
    plain = tiny_models.save("deepseek_v3", tmp_path / "plain")
    base = Checkpoint(quantized_models.quantized(plain, tmp_path / "base", name))
    stored = list(load_file(base.path / "model.safetensors").items())
    random.Random(0).shuffle(stored)
    found = list(unpacked(iter(stored), base, all_of(base)))
    wanted: dict[str, torch.Tensor] = {}
    with TensorReader(base) as reader:
        for weight in base.weight_map:
            wanted |= reader.verbatim(weight)
    assert len(found) == len(dict(found)) and dict(found).keys() == wanted.keys()
    for key, tensor in found:
        assert tensor.dtype == wanted[key].dtype and torch.equal(tensor, wanted[key])
    assert any(key.startswith("model.layers.3.mlp.experts") for key in wanted), "the draft layer"


def test_what_is_incomplete_does_not_come(qwen3: Path, tmp_path: Path) -> None:
    """The storage says what is missing."""
    base = Checkpoint(quantized_models.quantized(qwen3, tmp_path / "base", "gptq"))
    missing = "model.layers.1.mlp.experts.5.up_proj.scales"
    stored = load_file(base.path / "model.safetensors")
    tensors = ((key, stored[key]) for key in stored if key != missing)
    names = {name for name, _ in unpacked(tensors, base, all_of(base))}
    assert set(base.weight_map) - names == {"model.layers.1.mlp.experts.5.up_proj.weight"}


def test_experts_of_other_ranks_are_not_unpacked(qwen3: Path, tmp_path: Path) -> None:
    """Nor looked at: their own ranks say that they are damaged."""
    base = Checkpoint(quantized_models.quantized(qwen3, tmp_path / "base", "awq"))
    stored = load_file(base.path / "model.safetensors")
    stored["model.layers.1.mlp.experts.4.up_proj.scales"] /= 0
    held = {"model.layers.1.mlp.experts": {0, 5}, "model.layers.2.mlp.experts": set()}
    found = dict(unpacked(iter(stored.items()), base, held))
    pairs = product((0, 5), ("gate", "up", "down"))
    matrices = [f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight" for expert, name in pairs]
    assert {name for name in found if ".experts." in name} == {*matrices, *(f"{name}_scale" for name in matrices)}
    assert {name for name in found if ".experts." not in name} == {name for name in stored if ".experts." not in name}
