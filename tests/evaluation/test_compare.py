# SPDX-License-Identifier: Apache-2.0
"""`heapr eval`: the same pruned model in three formats, against the unpruned one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from heapr_vllm.cli.main import main
from heapr_vllm.errors import HeaprError
from heapr_vllm.evaluation.compare import evaluate
from heapr_vllm.evaluation.perplexity import counted_routes
from heapr_vllm.evaluation.settings import EvaluationSettings
from heapr_vllm.evaluation.table import format_evaluation
from heapr_vllm.formats import sizes
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import MASKS_FILE
from heapr_vllm.formats.evaluation_record import EvaluationRecord
from heapr_vllm.formats.masks import NeuronMasks, file_sha256
from heapr_vllm.prune import export_checkpoint
from heapr_vllm.prune.models.pruned import applied, opened
from tests.evaluation.local_tasks import write_task


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
    output = tmp_path / "results" / "eval.json"
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
    base, masked, small = json.loads(output.read_text())["models"]
    assert base["change"] == 0 and "stored_reduction" not in base
    assert masked["perplexity"] == small["perplexity"] == pytest.approx(base["perplexity"] * (1 + small["change"]))
    assert masked["masks_sha256"] == small["masks_sha256"] == file_sha256(masks_repository / MASKS_FILE)
    assert masked["stored_reduction"] == NeuronMasks.from_pretrained(compact).sparsity
    assert (
        masked["weight_bytes"] == small["weight_bytes"] == sizes.num_bytes(Checkpoint(compact)) < base["weight_bytes"]
    )
    assert 0 < masked["executed_reduction"] < 1
    assert masked["agreement"] == small["agreement"] and masked["agreement"]["top_k"] == 64 and "agreement" not in base
    printed = capsys.readouterr()
    assert printed.out.strip() == format_evaluation(EvaluationRecord.read(output))
    assert "64 log-probabilities of" in printed.err and "at 252 places: 127.97 KiB of temporary files" in printed.err


def test_routes_are_counted_in_forward_passes(qwen3: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    with counted_routes(model) as tokens, torch.no_grad():
        model(torch.arange(40).view(2, 20))
    model(torch.arange(40).view(2, 20))
    assert all(int(count.sum()) == 40 * 2 and len(count) == 8 for count in tokens.values()) and len(tokens) == 3


@pytest.mark.long
def test_tasks_in_transformers(compact: Path, qwen3: Path, corpus: Path, tmp_path: Path) -> None:
    """The pruned model must answer as transformers' own generation does, and is compared item by item."""
    prompts = ["abc def", "gaf bca", "hhd", "ca fe ba"]
    answers: dict[Path, list[str]] = {}
    tokenizer = AutoTokenizer.from_pretrained(qwen3)
    for model in (qwen3, compact):
        with opened(Checkpoint.resolve(model), "auto", "cpu") as (loaded, _):
            ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
            outputs = [loaded.generate(each, max_new_tokens=4, do_sample=False)[0, each.shape[1] :] for each in ids]
            answers[model] = [tokenizer.decode(output, skip_special_tokens=True).split("\n")[0] for output in outputs]
    expected = [*answers[qwen3][:3], "none"]
    items = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, expected, strict=True)]
    write_task(tmp_path / "tasks", "own", items)
    settings = EvaluationSettings(
        dataset=str(corpus),
        num_samples=2,
        max_seq_length=64,
        tasks=("own",),
        include_path=str(tmp_path / "tasks"),
        samples=str(tmp_path / "answers"),
    )
    record = evaluate([str(qwen3), str(compact)], settings)
    base, small = (row.tasks["own"] for row in record.models)
    kept = sum(one == other for one, other in zip(expected, answers[compact], strict=True))
    assert base.value == 0.75 and small.value == kept / 4 and small.recovery == pytest.approx(kept / 3)
    assert record.models[1].worst_task == "own" and record.models[1].worst_recovery == small.recovery
    assert (tmp_path / "answers" / "0-base" / "own.jsonl").is_file()
    assert (tmp_path / "answers" / "1-compact" / "own.jsonl").is_file()
    header, line, other = format_evaluation(record).split("\n\n")[1].splitlines()
    assert header.split() == ["task", "model", "metric", "shots", "samples", "value", "recovery", "McNemar", "p"]
    assert "0.750 [0.301, 0.954]" in line and other.endswith("  0.25")


def test_executed_flops_of_a_checkpoint_for_any_engine(
    compact: Path, masks_repository: Path, corpus: Path, tmp_path: Path
) -> None:
    export_checkpoint(masks_repository, tmp_path / "zeroed", layout="zeroed")
    settings = EvaluationSettings(dataset=str(corpus), num_samples=2, max_seq_length=64)
    one, other = evaluate([str(compact), str(tmp_path / "zeroed")], settings).models
    assert one.executed_reduction == other.executed_reduction is not None


def test_a_model_that_overflows(qwen3: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen3, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.norm.weight"].fill_(torch.nan)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    settings = EvaluationSettings(dataset=str(corpus), num_samples=1, max_seq_length=64)
    with pytest.raises(HeaprError, match="base predicts no numbers for this text, .*; try --dtype float32"):
        evaluate([str(tmp_path / "base")], settings)


def test_an_output_that_is_a_directory(qwen3: Path, corpus: Path, tmp_path: Path, capsys) -> None:
    for command in (["eval", str(qwen3), "--dataset", str(corpus)], ["report", str(qwen3)]):
        (tmp_path / "x.html").mkdir(exist_ok=True)
        assert main([*command, "-o", str(tmp_path / "x.html")]) == 2
        assert "x.html is a directory; name a file with --output" in capsys.readouterr().err


def test_text_longer_than_the_models_positions(qwen3: Path, corpus: Path) -> None:
    with pytest.raises(HeaprError, match="--max-seq-length 2048 exceeds the model's 512 positions"):
        evaluate([str(qwen3)], EvaluationSettings(dataset=str(corpus)))


def test_settings_that_do_not_fit(qwen3: Path, corpus: Path) -> None:
    settings = EvaluationSettings(dataset=str(corpus), num_samples=1, max_seq_length=512, backend="vllm")
    with pytest.raises(HeaprError, match="none of the model's 512 positions to generate .* --max-seq-length 511"):
        evaluate([str(qwen3)], settings)
    with pytest.raises(HeaprError, match="--engine-args are vLLM's; add --backend vllm"):
        evaluate([str(qwen3)], EvaluationSettings(dataset=str(corpus), engine_args={"max_model_len": 64}))
