# SPDX-License-Identifier: Apache-2.0
"""Full-size models with random weights or none: configs that Transformers reads, HEAPr-like masks."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from benchmarks.random_models import CONFIGS, random_masks, write_dense
from benchmarks.variants import write_pruned
from heapr_vllm.formats.deepseek_config import register_deepseek
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.model_executor.tuning.synthetic import PAPER_SHAPES


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_and_masks(name: str, tmp_path: Path) -> None:
    register_deepseek()
    dense = write_dense(name, tmp_path)
    config = AutoConfig.from_pretrained(dense)
    num_experts = config.n_routed_experts if config.model_type == "deepseek" else config.num_experts
    shape = num_experts, config.num_experts_per_tok, config.hidden_size, config.moe_intermediate_size
    assert shape == PAPER_SHAPES.get(name.removesuffix("-2-layers"), (32, 4, 1024, 768))
    masks = NeuronMasks.from_pretrained(write_pruned(dense, random_masks(CONFIGS[name], 0.25), tmp_path / "pruned"))
    assert masks.sparsity == pytest.approx(0.25, abs=0.03 if config.num_hidden_layers < 4 else 0.005)
    assert len(masks.keep) == config.num_hidden_layers - (config.model_type == "deepseek")
    widths = [width for layer in masks.widths.values() for width in layer.tolist()]
    assert all(width % 64 == 0 for width in widths) and len(set(widths)) > 2


def test_nothing_pruned_is_nothing_pruned() -> None:
    masks = random_masks(CONFIGS["Qwen3-MoE-1.7GB"], 0.0)
    assert all(bool(keep.all()) for keep in masks.keep.values())
