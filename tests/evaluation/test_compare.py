# SPDX-License-Identifier: Apache-2.0
"""`heapr eval`: the same pruned model in three formats, against the unpruned one."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from heapr_vllm.cli.main import main
from heapr_vllm.errors import HeaprError
from heapr_vllm.evaluation.compare import EvaluationSettings, compare, format_comparison
from heapr_vllm.evaluation.perplexity import counted_routes
from heapr_vllm.formats import sizes
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.prune import export_checkpoint
from heapr_vllm.prune.models.pruned import applied, opened


@pytest.fixture(scope="module")
def compact(masks_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("eval") / "compact"
    export_checkpoint(masks_repository, output)
    return output


def test_compact_expands_to_the_masked_model(compact: Path, masks_repository: Path, qwen3: Path) -> None:
    ids = torch.arange(60)[None]
    base = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    masks = NeuronMasks.from_pretrained(masks_repository)
    with applied(masks, base):
        expected = base(ids).logits
    for folder in (compact, masks_repository):
        with opened(Checkpoint.resolve(folder), "auto", "cpu") as (model, found):
            assert torch.equal(model(ids).logits, expected)
            assert all(torch.equal(found.keep[prefix], masks.keep[prefix]) for prefix in masks.keep)


def test_changed_weights_of_a_compact_checkpoint_count(compact: Path, tmp_path: Path) -> None:
    shutil.copytree(compact, tmp_path / "repaired")
    tensors = load_file(tmp_path / "repaired" / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensors[name] += 1
    save_file(tensors, tmp_path / "repaired" / "model.safetensors", metadata={"format": "pt"})
    with opened(Checkpoint.resolve(tmp_path / "repaired"), "float32", "cpu") as (model, masks):
        kept = masks.keep["model.layers.1.mlp.experts"][3]
        weight = model.model.layers[1].mlp.experts.down_proj[3]
        assert torch.equal(weight[:, kept], tensors[name]) and not weight[:, ~kept].any()


def test_table(compact: Path, masks_repository: Path, qwen3: Path, corpus: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "eval.json"
    assert (
        main(
            [
                "eval",
                str(masks_repository),
                str(compact),
                "--baseline",
                str(qwen3),
                "--dataset",
                str(corpus),
                "--num-samples",
                "4",
                "--max-seq-length",
                "64",
                "-o",
                str(output),
            ]
        )
        == 0
    )
    base, masked, small = rows = json.loads(output.read_text())
    assert base["change"] == 0 and "stored_reduction" not in base
    assert masked["perplexity"] == small["perplexity"] == pytest.approx(base["perplexity"] * (1 + small["change"]))
    assert masked["stored_reduction"] == NeuronMasks.from_pretrained(compact).sparsity
    assert (
        masked["weight_bytes"] == small["weight_bytes"] == sizes.num_bytes(Checkpoint(compact)) < base["weight_bytes"]
    )
    assert 0 < masked["executed_reduction"] < 1
    assert capsys.readouterr().out.strip() == format_comparison(rows)


def test_routes_are_counted_in_forward_passes(qwen3: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    with counted_routes(model) as tokens, torch.no_grad():
        model(torch.arange(40).view(2, 20))
    model(torch.arange(40).view(2, 20))
    assert all(int(count.sum()) == 40 * 2 and len(count) == 8 for count in tokens.values()) and len(tokens) == 3


def test_tasks_go_through_lm_eval(qwen3: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EvaluationSettings(dataset=str(corpus), num_samples=2, max_seq_length=64, tasks=("arc_easy",))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(HeaprError, match=r"--tasks needs lm-eval: pip install .+\[eval\]"):
        compare([str(qwen3)], settings)
    harness = ModuleType("lm_eval")
    harness.models = ModuleType("lm_eval.models")
    harness.models.huggingface = ModuleType("lm_eval.models.huggingface")
    harness.models.huggingface.HFLM = SimpleNamespace
    harness.simple_evaluate = lambda model, tasks: {
        "results": {task: {"alias": task, "acc,none": 0.25, "acc_stderr,none": 0.01} for task in tasks}
    }
    for module in (harness, harness.models, harness.models.huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    rows = compare([str(qwen3)], settings)
    assert rows[0]["tasks"] == {"arc_easy": {"acc": 0.25, "acc_stderr": 0.01}}
    header, line = format_comparison(rows).splitlines()
    assert header.endswith("arc_easy acc") and line.endswith("0.250")


def test_text_longer_than_the_models_positions(qwen3: Path, corpus: Path) -> None:
    with pytest.raises(HeaprError, match="--max-seq-length 2048 exceeds the model's 512 positions"):
        compare([str(qwen3)], EvaluationSettings(dataset=str(corpus)))


def test_tasks_are_not_run_in_vllm(qwen3: Path, corpus: Path) -> None:
    with pytest.raises(HeaprError, match="--tasks needs --backend transformers"):
        compare([str(qwen3)], EvaluationSettings(dataset=str(corpus), tasks=("arc_easy",), backend="vllm"))
