# SPDX-License-Identifier: Apache-2.0
"""Experts of transformers models under the names that their checkpoints give them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune.models.experts import expert_modules
from tests import tiny_models


def assert_named_as_in(checkpoint: Path, model: PreTrainedModel) -> None:
    """Same prefixes, and the module under each has the values that the checkpoint has there."""
    modules = expert_modules(model)
    assert list(modules) == list(Checkpoint(checkpoint).expert_shapes())
    tensors = load_file(checkpoint / "model.safetensors")
    for prefix, module in modules.items():
        names = (f"{prefix}.3.down_proj.weight", f"{prefix}.3.w2.weight")
        assert torch.equal(module.down_proj[3], next(tensors[name] for name in names if name in tensors)), prefix


@pytest.mark.parametrize("family", tiny_models.OWN)
def test_names_are_those_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    base = tiny_models.save(family, tmp_path / "base")
    assert_named_as_in(base, AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))


def test_mixtral_is_named_otherwise_in_transformers(tmp_path: Path) -> None:
    base = tiny_models.save("mixtral", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert "model.layers.0.block_sparse_moe.experts" in expert_modules(model)
    assert isinstance(model.get_submodule("model.layers.0.mlp.experts").down_proj, torch.nn.Parameter)
    model.save_pretrained(tmp_path / "again")
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", base))
    assert saved.keys() == original.keys() and all(torch.equal(saved[name], original[name]) for name in original)
    assert_named_as_in(tmp_path / "again", model)


def test_a_model_that_was_never_loaded(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_models.config("mixtral"))
    model.save_pretrained(tmp_path)
    assert_named_as_in(tmp_path, model)
