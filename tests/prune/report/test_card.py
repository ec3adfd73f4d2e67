# SPDX-License-Identifier: Apache-2.0
"""The model card: metadata that the Hub takes, results and limits, names that stay text."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from heapr_vllm.cli.main import main
from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import MASKS_FILE, PruningConfig
from heapr_vllm.formats.evaluation_record import EvaluationRecord
from heapr_vllm.formats.masks import NeuronMasks, file_sha256
from heapr_vllm.formats.repair_record import RepairRecord
from heapr_vllm.formats.sizes import num_bytes
from heapr_vllm.prune import export_checkpoint
from heapr_vllm.prune.export.push import check_whole
from heapr_vllm.prune.report.card import card_of, model_card, write_results
from heapr_vllm.prune.report.measured import EVALUATION_FILE, measured, read_evaluation
from heapr_vllm.prune.report.summary import summarize
from heapr_vllm.prune.selection.budget import format_size
from tests.prune.report.test_page import HOSTILE, row, write_evaluation
from tests.prune.report.test_summary import masks, record

METADATA = {"criterion": "fisher", "scope": "global", "align": 16}
DIGEST = "0" * 64


def card(
    pruning: PruningConfig | None = None,
    evaluation: Path | None = None,
    method: dict = METADATA,
    repair: RepairRecord | None = None,
    **changes: object,
) -> ModelCard:
    """A card of the small masks of test_summary.py."""
    pruned = masks()
    pruned.metadata.update(method)
    found = measured(read_evaluation(evaluation), Path("pruned"), DIGEST, 0.5) if evaluation else None
    sizes = {"checkpoint_bytes": 1000, "routed_bytes": 600}
    layout = pruning.layout if pruning else "zeroed"
    calibration = record(**sizes, **changes)
    text = model_card(replace(summarize(pruned, calibration), repair=repair), layout, pruning, calibration, found)
    assert ModelCard(text).content.splitlines()[0] == "---"
    return ModelCard(text)


def test_metadata_before_an_evaluation() -> None:
    found = card(PruningConfig(layout="masks"), model="Qwen/Qwen3-30B-A3B", revision="a" * 40)
    assert found.data.base_model == "Qwen/Qwen3-30B-A3B" and found.data["base_model_relation"] == "adapter"
    assert found.data.library_name == "vllm" and found.data.tags == ["moe", "pruning", "heapr"]
    assert found.data.eval_results is None and "Not measured yet. `heapr eval" in found.text
    assert "What the pruning costs in quality has not been measured." in found.text
    assert "    vllm serve <this repository> --load-format heapr" in found.text
    assert "| weights once loaded or exported | 1000 B | 700 B | -30.0% |" in found.text


@pytest.mark.parametrize("model", ["/home/me/model", "model", "me/model", HOSTILE])
def test_what_is_on_no_hub_is_no_base_model(model: str) -> None:
    """The Hub refuses a card whose `base_model` is none."""
    assert card(model=model).data.base_model is None


def test_results(tmp_path: Path) -> None:
    evaluation = write_evaluation(tmp_path / "e.json", row("pruned", stored_reduction=0.5), dataset="/home/me/text.txt")
    found = card(PruningConfig(layout="compact"), evaluation)
    name, results = model_index_to_eval_results(found.data.to_dict()["model-index"])
    assert name == "m, 50% pruned" and results == found.data.eval_results
    assert {(each.dataset_name, each.metric_type): each.metric_value for each in results} == {
        ("text.txt", "perplexity"): 9.31,
        ("text.txt", "kl_divergence"): 0.0213,
        ("text.txt", "top1_agreement"): 0.941,
        ("brackets", "exact_match"): 0.7,
    }
    assert "| perplexity | 9.210 | 9.310 | +1.09% |" in found.text
    assert "| brackets, exact_match | 0.710 [0.610, 0.790] | 0.700 [0.600, 0.780] | 98.6% of the base's |" in found.text
    assert "/home/me" not in found.content, "where files lay is nobody's business"
    assert "8 x up to 64 tokens of text.txt, seed 0" in found.text
    content = json.loads(evaluation.read_text())
    content["settings"] |= {"loss": "assistant", "dataset": ["chat=/home/me/x.jsonl:0.5", "me/set[a](train):0.5"]}
    evaluation.write_text(json.dumps(content))
    found = card(PruningConfig(layout="compact"), evaluation)
    assert "8 x up to 64 tokens of chat, me/set\\[a](train), assistant tokens only, seed 0" in found.text
    assert "/home/me" not in found.content


def test_local_files_are_named_without_their_folders() -> None:
    mix = ["code=/home/me/x.jsonl:0.25", "../me/y.txt.gz:0.25", "me/z.md:0.25", "me/set:0.25"]
    repair = RepairRecord(
        method="least-squares",
        dataset=", ".join(mix),
        dataset_fingerprint="",
        num_samples=2,
        max_seq_length=8,
        seed=0,
        tokens=16,
        prior=1.0,
        experts=3,
        experts_with_few_tokens=0,
        output_error_removed=0.5,
    )
    found = card(repair=repair, dataset=mix)
    assert found.text.count("tokens of code, y.txt.gz, z.md, me/set, ") == 2


def test_how_neurons_were_chosen() -> None:
    worst = {"weights": {"a": 0.5, "b": 0.5}, "largest": 0.125, "bound": 0.12}
    found = card(method=METADATA | {"worst_case": worst, "mix": {"a": 0.75, "b|": 0.25}})
    assert "- chosen for the source that loses most: 0.1250 nats per token, and no choice gets below" in found.text
    assert "- chosen for the mix a 75%, b\\| 25%\n" in found.text


def test_weights_that_are_there_have_their_own_size(masks_repository: Path, tmp_path: Path) -> None:
    export_checkpoint(masks_repository, tmp_path / "zeroed", layout="zeroed")
    size = format_size(num_bytes(Checkpoint(tmp_path / "zeroed")))
    text = (tmp_path / "zeroed" / "README.md").read_text()
    assert f"| weights | {size} | {size} | +0.0% |" in text and text == card_of(tmp_path / "zeroed")


def test_names_stay_text(tmp_path: Path) -> None:
    name = f"a|b\\|c\n# {HOSTILE}"
    evaluation = write_evaluation(
        tmp_path / "e.json", row(name, masks_sha256=DIGEST, tasks={name: row("")["tasks"]["brackets"]}), dataset=name
    )
    found = card(None, evaluation, model=name, dataset=name, revision=name, versions={"heapr-vllm": name})
    assert "<script>" not in found.text and len([line for line in found.text.splitlines() if line[:2] == "# "]) == 1
    for line in found.text.splitlines():
        if line.startswith("|"):
            assert line.replace("\\\\", "").replace("\\|", "").count("|") in (3, 5)
    assert found.data.eval_results[-1].dataset_name == name


def test_results_go_into_the_folder(masks_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "masks"
    shutil.copytree(masks_repository, folder)
    evaluation = write_evaluation(tmp_path / "e.json", row(folder), row("another", perplexity=77.0))
    argv = ["report", str(folder), "--evaluation", str(evaluation), "-o", str(tmp_path / "page.html")]
    before = (folder / "README.md").read_text()
    assert main(argv) == 0 and (folder / "README.md").read_text() == before, "only if asked"
    assert main([*argv, "--card"]) == 0
    text = (folder / "README.md").read_text()
    assert "| perplexity | 9.210 | 9.310 |" in text and "77" not in text
    assert [model.model for model in EvaluationRecord.read(folder / EVALUATION_FILE).models] == ["base", str(folder)]
    assert main([*argv, "--card"]) == 0 and (folder / "README.md").read_text() == text
    check_whole(folder)
    (folder / "README.md").write_text(text + "My own words.\n")
    assert main([*argv, "--card"]) == 2
    assert "was changed, or written by another version" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == text + "My own words.\n"


def test_an_evaluation_of_something_else(masks_repository: Path, tmp_path: Path) -> None:
    digest = file_sha256(masks_repository / MASKS_FILE)
    models = [row("one", stored_reduction=NeuronMasks.from_pretrained(masks_repository).sparsity), row("two")]
    changed = row(masks_repository, masks_sha256=DIGEST)
    for rows in (models[:1], models[1:], models, [], [changed], [row(name, masks_sha256=digest) for name in "ab"]):
        evaluation = read_evaluation(write_evaluation(tmp_path / "e.json", *rows))
        with pytest.raises(HeaprError, match="is not among the models of the evaluation; run `heapr eval"):
            write_results(masks_repository, evaluation)
    assert not (masks_repository / EVALUATION_FILE).exists()
    assert json.loads((tmp_path / "e.json").read_text())["models"][0]["model"] == "base"


def test_an_evaluation_of_the_same_masks_elsewhere(masks_repository: Path, tmp_path: Path) -> None:
    shutil.copytree(masks_repository, tmp_path / "moved")
    moved = row("/before", perplexity=8.125, masks_sha256=file_sha256(masks_repository / MASKS_FILE))
    write_results(tmp_path / "moved", read_evaluation(write_evaluation(tmp_path / "e.json", row("other"), moved)))
    assert "| perplexity | 9.210 | 8.125 |" in (tmp_path / "moved" / "README.md").read_text()
