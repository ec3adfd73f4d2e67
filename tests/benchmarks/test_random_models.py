# SPDX-License-Identifier: Apache-2.0
"""Full-size models without weights: configs that Transformers reads, HEAPr-like masks, and a served comparison."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from benchmarks.random_models import CONFIGS, random_masks, write_dense, write_pruned
from heapr_vllm.formats.deepseek_config import register_deepseek
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.model_executor.tuning.synthetic import PAPER_SHAPES
from tests.model_executor.engine import ENVIRONMENT, ROOT


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_and_masks(name: str, tmp_path: Path) -> None:
    register_deepseek()
    config = AutoConfig.from_pretrained(write_dense(name, tmp_path))
    num_experts = config.n_routed_experts if config.model_type == "deepseek" else config.num_experts
    shape = num_experts, config.num_experts_per_tok, config.hidden_size, config.moe_intermediate_size
    assert shape == PAPER_SHAPES.get(name, (32, 4, 1024, 768))
    masks = NeuronMasks.from_pretrained(write_pruned(name, 0.25, tmp_path))
    assert masks.sparsity == pytest.approx(0.25, abs=0.03 if name == "tiny" else 0.005)
    assert len(masks.keep) == config.num_hidden_layers - (config.model_type == "deepseek")
    widths = [width for layer in masks.widths.values() for width in layer.tolist()]
    assert all(width % 64 == 0 for width in widths) and len(set(widths)) > 2


def test_nothing_pruned_is_nothing_pruned() -> None:
    masks = random_masks(CONFIGS["Qwen3-MoE-1.7GB"], 0.0)
    assert all(bool(keep.all()) for keep in masks.keep.values())


@pytest.mark.vllm
def test_served_comparison(tmp_path: Path) -> None:
    """The GPU benchmark's command at toy size: two servers, asked in turn, one row."""
    table = tmp_path / "rows.csv"
    command = [
        sys.executable,
        "-m",
        "benchmarks.serving",
        "--model",
        "tiny",
        "--workload",
        "smoke",
        "--rounds",
        "1",
        "--csv",
        str(table),
        "--work",
        str(tmp_path),
        "--",
        "--max-model-len",
        "64",
        "--enforce-eager",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (row,) = csv.DictReader(table.open())
    assert row["model"] == "tiny 25%" and row["workload"] == "smoke" and float(row["ratio"]) > 0
    assert float(row["dense_tok_s"]) > 0 and int(row["dense_kv_tokens"]) == int(row["pruned_kv_tokens"]) > 0
