# SPDX-License-Identifier: Apache-2.0
"""Experts of 4 bits while they are loaded are those of an export; everything else passes as it is."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.reader import TensorReader
from heapr_vllm.model_executor.unpacking import unpacked
from tests import quantized_models, tiny_models


@pytest.mark.parametrize("name", ["gptq", "awq-linears", "w4a16-asymmetric", "int8-channel"])
def test_in_any_order(name: str, tmp_path: Path) -> None:
    """Of a model with a draft layer, whose experts are not pruned and stay packed."""
    plain = tiny_models.save("deepseek_v3", tmp_path / "plain")
    base = Checkpoint(quantized_models.quantized(plain, tmp_path / "base", name))
    stored = list(load_file(base.path / "model.safetensors").items())
    random.Random(0).shuffle(stored)
    found = list(unpacked(iter(stored), base))
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
    names = {name for name, _ in unpacked(((key, stored[key]) for key in stored if key != missing), base)}
    assert set(base.weight_map) - names == {"model.layers.1.mlp.experts.5.up_proj.weight"}
