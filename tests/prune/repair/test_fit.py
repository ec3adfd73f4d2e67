# SPDX-License-Identifier: Apache-2.0
"""`heapr export --repair`: refitted tensors, memory groups, resume, records, and what cannot be repaired."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from heapr_vllm.cli.main import main
from heapr_vllm.errors import HeaprError
from heapr_vllm.evaluation.perplexity import perplexity
from heapr_vllm.formats.config import PruningConfig
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.prune import NeuronMoments, collect_moments, export_checkpoint
from heapr_vllm.prune.calibration.record import CALIBRATION_FILE, CalibrationRecord
from heapr_vllm.prune.export.masks_repository import write_masks_repository
from heapr_vllm.prune.models.pruned import applied
from heapr_vllm.prune.repair import fit as repair_module
from heapr_vllm.prune.repair.fit import RepairSettings, check_tokens, layer_groups
from heapr_vllm.prune.repair.least_squares import compensations, repairable, repaired
from heapr_vllm.prune.repair.second_moments import collect_second_moments
from heapr_vllm.prune.selection.selector import select
from heapr_vllm.prune.text.documents import read_documents
from heapr_vllm.prune.text.samples import token_samples
from tests.conftest import BUNDLED

FEW_TOKENS = {f"model.layers.{layer}.mlp.experts": [36] * 8 for layer in range(3)}
LAYER_BYTES = 8 * 8 * 64 * 64  # of one layer of the tiny model, all experts
ONE_LAYER = RepairSettings(memory=LAYER_BYTES)
pytestmark = pytest.mark.filterwarnings("ignore:.*experts to repair see fewer tokens")


@pytest.fixture(scope="module")
def compact(masks_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("repaired") / "compact"
    export_checkpoint(masks_repository, output, repair=RepairSettings())
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_kept_columns_of_down_proj_change(compact: Path, awkward_masks: NeuronMasks, qwen3: Path) -> None:
    base, got = load_file(qwen3 / "model.safetensors"), load_file(compact / "model.safetensors")
    changed = set()
    for name, tensor in got.items():
        wanted = base[name]
        if ".experts." in name:
            prefix, expert, projection, _ = name.rsplit(".", 3)
            keep = awkward_masks.keep[prefix][int(expert)]
            wanted = wanted[:, keep] if projection == "down_proj" else wanted[keep]
        assert tensor.shape == wanted.shape and tensor.isfinite().all()
        if not torch.equal(tensor, wanted):
            changed.add(name)
    tokens = json.loads((compact / "heapr" / CALIBRATION_FILE).read_text())["tokens"]
    assert changed == {
        f"{prefix}.{expert}.down_proj.weight"
        for prefix, experts in repairable(awkward_masks).items()
        for expert in experts
        if tokens[prefix][expert]
    }


def test_streamed_repair_gives_the_same_bytes(masks_repository: Path, compact: Path, tmp_path: Path) -> None:
    """A model that was calibrated with one layer in memory is repaired so, too."""
    shutil.copytree(masks_repository, tmp_path / "masks")
    record = tmp_path / "masks" / "heapr" / CALIBRATION_FILE
    record.write_text(json.dumps(json.loads(record.read_text()) | {"stream": True}))
    export_checkpoint(tmp_path / "masks", tmp_path / "streamed", repair=RepairSettings())
    assert contents(tmp_path / "streamed")["model.safetensors"] == contents(compact)["model.safetensors"]
    assert not list(tmp_path.glob(".*"))


def test_zeroed_layout_equals_the_repair_in_memory(
    masks_repository: Path, awkward_masks: NeuronMasks, qwen3: Path, corpus: Path, tmp_path: Path
) -> None:
    export_checkpoint(masks_repository, tmp_path / "zeroed", layout="zeroed", repair=RepairSettings())
    assert "quantization_config" not in json.loads((tmp_path / "zeroed" / "config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    zeroed = AutoModelForCausalLM.from_pretrained(tmp_path / "zeroed", dtype=torch.float32)
    blocks = token_samples(read_documents(str(corpus)), AutoTokenizer.from_pretrained(qwen3), 6, 64, seed=0)
    found = compensations(collect_second_moments(base, blocks), awkward_masks)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    ids = torch.arange(50)[None]
    with repaired(base, awkward_masks, found):
        torch.testing.assert_close(zeroed(ids).logits, base(ids).logits, rtol=0, atol=1e-4)
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())


def test_memory_limit_does_not_change_the_result(masks_repository: Path, compact: Path, tmp_path: Path) -> None:
    export_checkpoint(masks_repository, tmp_path / "compact", repair=ONE_LAYER)
    assert contents(tmp_path / "compact") == contents(compact)
    assert [path.name for path in tmp_path.iterdir()] == ["compact"], "nothing else is left"


def test_layers_are_grouped_by_memory(awkward_masks: NeuronMasks) -> None:
    experts = repairable(awkward_masks)
    prefixes = list(experts)
    sizes = [8 * len(chosen) * 64 * 64 for chosen in experts.values()]
    assert layer_groups(awkward_masks, experts, sum(sizes)) == [prefixes]
    assert layer_groups(awkward_masks, experts, max(sizes)) == [[prefix] for prefix in prefixes]
    with pytest.raises(HeaprError, match=r"layers.0.mlp.experts take 0.2 MiB; pass --repair-memory 1MiB or more"):
        layer_groups(awkward_masks, experts, 1000)


def test_interrupted_repair_continues_behind_the_last_group(
    masks_repository: Path, compact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    def collect(*args, experts, **kwargs):
        runs.append(list(experts))
        if len(runs) == 2:
            raise KeyboardInterrupt
        return collect_second_moments(*args, experts=experts, **kwargs)

    monkeypatch.setattr(repair_module, "collect_second_moments", collect)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(masks_repository, tmp_path / "compact", repair=ONE_LAYER)
    assert [path.name for path in tmp_path.iterdir()] == [".compact.repair"]
    export_checkpoint(masks_repository, tmp_path / "compact", repair=ONE_LAYER)
    layers = [[f"model.layers.{layer}.mlp.experts"] for layer in range(3)]
    assert runs == [layers[0], layers[1], layers[1], layers[2]]
    assert contents(tmp_path / "compact") == contents(compact)
    assert [path.name for path in tmp_path.iterdir()] == ["compact"]


def test_leftovers_of_another_repair_are_not_used(
    masks_repository: Path, compact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repair whose export failed, another one interrupted in the same place, then each of them again."""
    more = replace(ONE_LAYER, num_samples=8)
    export_checkpoint(masks_repository, tmp_path / "more", repair=more)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("heapr_vllm.prune.export.shards.save_file", fails_with(OSError("disk full")))
        export_checkpoint(masks_repository, tmp_path / "out", repair=ONE_LAYER)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(repair_module, "_save_state", fails_with(KeyboardInterrupt()))
        export_checkpoint(masks_repository, tmp_path / "out", repair=more)
    export_checkpoint(masks_repository, tmp_path / "out", repair=ONE_LAYER)
    assert contents(tmp_path / "out") == contents(compact)
    export_checkpoint(masks_repository, tmp_path / "out", repair=more, overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "more")


def fails_with(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.long
def test_killed_export_continues_to_the_same_bytes(masks_repository: Path, compact: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "heapr_vllm",
        "export",
        str(masks_repository),
        "-o",
        str(tmp_path / "compact"),
        "--repair",
        "least-squares",
        "--repair-memory",
        str(LAYER_BYTES),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / ".compact.repair" / "state.json").exists() and time.time() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "compact").exists()
    assert subprocess.run(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode == 0
    assert contents(tmp_path / "compact") == contents(compact)
    assert not (tmp_path / ".compact.repair").exists()


def test_record_card_and_config(compact: Path, masks_repository: Path, capsys: pytest.CaptureFixture) -> None:
    block = PruningConfig.from_dict(json.loads((compact / "config.json").read_text())["quantization_config"])
    assert block.repair == "least-squares" and block.layout == "compact"
    masks_block = json.loads((masks_repository / "config.json").read_text())["quantization_config"]
    assert PruningConfig.from_dict({key: value for key, value in masks_block.items() if key != "repair"}).repair is None
    assert main(["inspect", str(compact), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["repair"]
    assert record["tokens"] == 6 * 64 and record["method"] == "least-squares" and record["prior"] > 0
    assert 0 < record["output_error_removed"] < 1
    assert (
        record["dataset_fingerprint"]
        == json.loads((compact / "heapr" / CALIBRATION_FILE).read_text())["dataset_fingerprint"]
    )
    assert main(["inspect", str(compact)]) == 0
    line = "least-squares on 384 tokens"
    assert f"repair: {line}" in capsys.readouterr().out and f"| repair | {line}" in (compact / "README.md").read_text()


def test_export_of_an_export_does_not_claim_a_repair(compact: Path, tmp_path: Path) -> None:
    export_checkpoint(compact, tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]["repair"] is None
    assert not (tmp_path / "plain" / "heapr" / "repair.json").exists()


def test_other_text_and_more_samples(masks_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "other.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    assert (
        main(
            [
                "export",
                str(masks_repository),
                "-o",
                str(tmp_path / "out"),
                "--repair",
                "least-squares",
                "--repair-dataset",
                str(tmp_path / "other.txt"),
                "--repair-samples",
                "9",
            ]
        )
        == 0
    )
    assert f"least-squares on 576 tokens of {tmp_path / 'other.txt'}" in capsys.readouterr().out


def moved(masks_repository: Path, folder: Path, **changes: object) -> Path:
    """A copy of the masks repository with another calibration record."""
    shutil.copytree(masks_repository, folder)
    path = folder / "heapr" / CALIBRATION_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ["--repair", "magic"], "repair 'magic' is not one of least-squares"),
        ({}, ["--repair-samples", "9"], "belong to --repair least-squares"),
        ({}, ["--repair", "least-squares", "--repair-memory", "1KiB"], "pass --repair-memory 1MiB or more"),
        ({}, ["--repair", "least-squares", "--repair-samples", "9999"], "has .* samples of 64 tokens, 9999 are needed"),
        (
            {"tokens": FEW_TOKENS},
            ["--repair", "least-squares", "--repair-samples", "1"],
            "too little text for a repair: .* --repair-samples",
        ),
        (
            {"dataset": "gone.txt"},
            ["--repair", "least-squares"],
            "dataset file gone.txt does not exist; correct its name; or name another text with --repair",
        ),
        ({"seed": 5}, ["--repair", "least-squares"], "not the text of the calibration any more .* --repair-dataset"),
    ],
)
def test_what_cannot_be_repaired(
    changes: dict,
    arguments: list[str],
    message: str,
    masks_repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    masks = moved(masks_repository, tmp_path / "masks", **changes)
    capsys.readouterr()
    assert main(["export", str(masks), "-o", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["masks"]


def test_whole_experts_leave_nothing_to_repair(calibration: Path, tmp_path: Path) -> None:
    even = (torch.arange(8) % 2 == 0)[:, None].expand(8, 64)
    keep = {prefix: even.clone() for prefix in NeuronMoments.from_pretrained(calibration).layers}
    record = json.loads((calibration / CALIBRATION_FILE).read_text())
    base = {"name_or_path": record["model"], "revision": None, "fingerprint": record["base_fingerprint"]}
    masks = NeuronMasks(
        keep, {"criterion": "none", "scope": "expert", "align": 1, "sparsity": None, "base_model": base}
    )
    write_masks_repository(masks, calibration, tmp_path / "masks")
    with pytest.raises(HeaprError, match="kept whole or removed whole, so there is nothing to repair"):
        export_checkpoint(tmp_path / "masks", tmp_path / "out", repair=RepairSettings())


def test_few_tokens_are_counted_and_a_remedy_named() -> None:
    masks = NeuronMasks({"experts": torch.arange(40).expand(4, 40) < torch.tensor([10, 10, 10, 20])[:, None]})
    tokens = {"experts": [100, 100, 4, 0]}
    calibration = CalibrationRecord(model="m", dataset="d", num_calibration_samples=8, tokens=tokens)
    experts = {"experts": [0, 1, 2, 3]}
    with pytest.warns(UserWarning, match="2 of the 4 .* with 8 samples; --repair-samples 20 would do"):
        assert check_tokens(masks, experts, calibration, 8) == 2
    with pytest.warns(UserWarning, match="1 of the 4"):
        assert check_tokens(masks, experts, calibration, 20) == 1
    tokens["experts"] = [1, 1, 4, 0]
    with pytest.raises(HeaprError, match="too little text for a repair: 4 of the 4 .* --repair-samples 80 would do"):
        check_tokens(masks, experts, calibration, 8)


def test_repair_helps_a_trained_model(python_corpus: Path) -> None:
    """Held-out perplexity of the bundled model at half size: repaired, a good part of the increase is gone."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    blocks = {
        split: token_samples(read_documents(str(python_corpus / f"{split}.jsonl")), tokenizer, 16, 512, seed=0)
        for split in ("calibration", "held_out")
    }
    moments = collect_moments(model, blocks["calibration"], batch_size=4)
    masks = select(moments, flops=0.5)
    found = compensations(collect_second_moments(model, blocks["calibration"], batch_size=4), masks)
    dense = perplexity(model, blocks["held_out"])
    with applied(masks, model):
        pruned = perplexity(model, blocks["held_out"])
    with repaired(model, masks, found):
        assert perplexity(model, blocks["held_out"]) - dense < 0.75 * (pruned - dense)
    assert perplexity(model, blocks["held_out"]) == dense
