# SPDX-License-Identifier: Apache-2.0
"""`heapr tune` of masks over quantized base models is for the layers that are served, and needs no base model."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("vllm")
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.model_executor.quantization import HeaprConfig
from heapr_vllm.model_executor.tuning.jobs import jobs_of_model
from heapr_vllm.prune.export.masks_repository import read_pruning_config
from tests import quantized_models
from tests.conftest import prune

ATTENTION = r".*\.self_attn\.\w+_proj\.weight"


@pytest.mark.parametrize(
    ("name", "linears"),
    [
        ("gptq-linears", ATTENTION),
        ("int8-linears", ATTENTION),
        ("awq-linears", quantized_models.LINEARS),
        ("w4a16-linears", quantized_models.LINEARS),
    ],
    ids=["gptq-attention", "int8-attention", "awq-all", "w4a16-all"],
)
def test_experts_as_they_are_served(
    name: str, linears: str, qwen3: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_models, "LINEARS", linears)
    base = quantized_models.quantized(qwen3, tmp_path / "base", name)
    prune(base, corpus, tmp_path, sparsity=0.5, num_samples=2)
    config = HeaprConfig(read_pruning_config(tmp_path / "masks"))
    config.bases[None], config.hidden_size = Checkpoint(base), 64
    served, _ = config.storage_formats()
    assert (served is None) == (linears == ATTENTION)
    shutil.rmtree(base)
    for job in jobs_of_model(tmp_path / "masks"):
        assert job.scheme == (served.widened() if served else None)
