# SPDX-License-Identifier: Apache-2.0
"""The model card: metadata that the Hub takes, results and limits, names that stay text."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from heapr_vllm.cli.main import main
from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.config import MASKS_FILE, PruningConfig
from heapr_vllm.formats.evaluation_record import EvaluationRecord
from heapr_vllm.formats.masks import NeuronMasks, file_sha256
from heapr_vllm.prune.export.push import check_whole
from heapr_vllm.prune.report.card import model_card, write_results
from heapr_vllm.prune.report.measured import EVALUATION_FILE, measured, read_evaluation
from tests.prune.report.test_page import HOSTILE, row, write_evaluation
from tests.prune.report.test_summary import masks, record

METADATA = {"criterion": "fisher", "scope": "global", "align": 16}
DIGEST = "0" * 64


def card(pruning: PruningConfig | None = None, evaluation: Path | None = None, **changes: object) -> ModelCard:
    """A card of the small masks of test_summary.py."""
    pruned = masks()
    pruned.metadata.update(METADATA)
    found = measured(read_evaluation(evaluation), Path("pruned"), DIGEST, 0.5) if evaluation else None
    sizes = {"checkpoint_bytes": 1000, "routed_bytes": 600}
    layout = pruning.layout if pruning else "zeroed"
    text = model_card(pruned, layout, pruning, record(**sizes, **changes), found=found)
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


def test_names_stay_text(tmp_path: Path) -> None:
    name = f"a|b\n# {HOSTILE}"
    evaluation = write_evaluation(
        tmp_path / "e.json", row(name, masks_sha256=DIGEST, tasks={name: row("")["tasks"]["brackets"]}), dataset=name
    )
    found = card(None, evaluation, model=name, dataset=name, revision=name, versions={"heapr-vllm": name})
    assert "<script>" not in found.text and len([line for line in found.text.splitlines() if line[:2] == "# "]) == 1
    for line in found.text.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") in (3, 5)
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
