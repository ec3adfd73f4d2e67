# SPDX-License-Identifier: Apache-2.0
"""Masks repository, compact and zeroed checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from heapr_vllm.cli.main import main
from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import PruningConfig
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.prune import CalibrationSettings, export, export_checkpoint, write_masks_repository
from heapr_vllm.prune.calibration.calibrate import calibrate
from heapr_vllm.prune.export.shards import through
from heapr_vllm.prune.models.pruned import applied, opened
from heapr_vllm.prune.selection.selector import select
from tests import tiny_models

FIRST = "model.layers.0.mlp.experts"


def test_masks_repository_is_small_and_complete(masks_repository: Path, qwen3: Path) -> None:
    names = {path.relative_to(masks_repository).as_posix() for path in masks_repository.rglob("*") if path.is_file()}
    assert {"config.json", "tokenizer.json", "README.md", "heapr/masks.safetensors", "heapr/calibration.json"} <= names
    assert not list(masks_repository.glob("*.safetensors")), "vLLM would load it as weights"
    assert sum(path.stat().st_size for path in masks_repository.rglob("*") if path.is_file()) < 2**20
    config = json.loads((masks_repository / "config.json").read_text())
    block = PruningConfig.from_dict(config.pop("quantization_config"))
    assert block.layout == "masks" and block.base_model.name_or_path == str(qwen3)
    config.pop("transformers_weights")
    assert config == json.loads((qwen3 / "config.json").read_text())


def test_compact_holds_exactly_the_kept_neurons(
    masks_repository: Path, awkward_masks: NeuronMasks, qwen3: Path, tmp_path: Path
) -> None:
    export_checkpoint(masks_repository, tmp_path / "compact")
    base, compact = load_file(qwen3 / "model.safetensors"), load_file(tmp_path / "compact" / "model.safetensors")
    assert base.keys() == compact.keys()
    for prefix, keep in awkward_masks.keep.items():
        for expert, kept in enumerate(keep):
            name = f"{prefix}.{expert}"
            assert torch.equal(compact[f"{name}.gate_proj.weight"], base[f"{name}.gate_proj.weight"][kept])
            assert torch.equal(compact[f"{name}.up_proj.weight"], base[f"{name}.up_proj.weight"][kept])
            assert torch.equal(compact[f"{name}.down_proj.weight"], base[f"{name}.down_proj.weight"][:, kept])
    assert compact[f"{FIRST}.0.gate_proj.weight"].shape == (0, 64)
    for name in (name for name in base if ".experts." not in name):
        assert torch.equal(base[name], compact[name])
    index = json.loads((tmp_path / "compact" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == compact.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in compact.values())
    block = json.loads((tmp_path / "compact" / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == "heapr" and block["layout"] == "compact"


def test_zeroed_layout_equals_masks_applied(
    masks_repository: Path, awkward_masks: NeuronMasks, qwen3: Path, tmp_path: Path
) -> None:
    export_checkpoint(masks_repository, tmp_path / "zeroed", layout="zeroed")
    assert "quantization_config" not in json.loads((tmp_path / "zeroed" / "config.json").read_text())
    ids = torch.arange(50)[None]
    zeroed = AutoModelForCausalLM.from_pretrained(tmp_path / "zeroed", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    assert (zeroed(ids).logits - base(ids).logits).abs().max() > 1e-2
    with applied(awkward_masks, base):
        torch.testing.assert_close(zeroed(ids).logits, base(ids).logits, rtol=0, atol=1e-5)


def test_stacked_experts_and_several_shards(masks_repository: Path, qwen3: Path, tmp_path: Path) -> None:
    """A base with fused 3-D expert tensors in two shards gives the same compact tensors as the per-expert one."""
    base = load_file(qwen3 / "model.safetensors")
    stacked = {name: tensor for name, tensor in base.items() if ".experts." not in name}
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            proj: [base[f"{prefix}.{e}.{proj}.weight"] for e in range(8)]
            for proj in ("gate_proj", "up_proj", "down_proj")
        }
        stacked[f"{prefix}.gate_up_proj"] = torch.cat(
            [torch.stack(parts["gate_proj"]), torch.stack(parts["up_proj"])], 1
        )
        stacked[f"{prefix}.down_proj"] = torch.stack(parts["down_proj"])
    fused = tmp_path / "fused"
    shutil.copytree(qwen3, fused)
    (fused / "model.safetensors").unlink()
    names = sorted(stacked)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: stacked[name].contiguous() for name in part}, fused / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (fused / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    export_checkpoint(masks_repository, tmp_path / "a")
    export_checkpoint(masks_repository, tmp_path / "b", model=str(fused), verify=False)
    expected = load_file(tmp_path / "a" / "model.safetensors")
    got = {}
    for shard in (tmp_path / "b").glob("*.safetensors"):
        got |= load_file(shard)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_another_base_model_is_refused(masks_repository: Path, qwen3: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(qwen3, tuned)
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.layers.0.mlp.gate.weight"] += 1
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HeaprError, match="fingerprint differs .* --no-verify"):
        export_checkpoint(masks_repository, tmp_path / "out", model=str(tuned))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned"], "nothing half-written"
    export_checkpoint(masks_repository, tmp_path / "out", model=str(tuned), verify=False)
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("layout", ["compact", "zeroed"])
@pytest.mark.parametrize(("family", "layers"), [("deepseek_v3", (1, 2)), ("qwen3_next", (0, 1))])
def test_draft_layer_is_copied(family: str, layers: tuple[int, ...], layout: str, corpus: Path, tmp_path: Path) -> None:
    """Some checkpoints hold a layer for multi-token prediction; it has experts, and keeps them."""
    base = tiny_models.save(family, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    draft = {name: tensor for name, tensor in tensors.items() if name.startswith(tiny_models.DRAFT[family])}
    moments = [
        calibrate(
            CalibrationSettings(
                model=str(base), dataset=str(corpus), num_calibration_samples=2, max_seq_length=32, stream=stream
            ),
            tmp_path / f"calib{stream}",
        )
        for stream in (False, True)
    ]
    assert all(set(part.tokens) == {f"model.layers.{layer}.mlp.experts" for layer in layers} for part in moments)
    write_masks_repository(select(moments[0], sparsity=0.5), tmp_path / "calibTrue", tmp_path / "masks")
    export_checkpoint(tmp_path / "masks", tmp_path / "out", model=str(base), layout=layout)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert draft and all(torch.equal(written[name], tensor) for name, tensor in draft.items())
    own = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name and name not in draft)
    assert moments[0].metadata["routed_bytes"] == own, "the draft layer's experts cannot be pruned"
    if layout == "compact":
        with opened(Checkpoint(tmp_path / "out"), "float32", "cpu") as (model, masks):
            assert masks.sparsity == pytest.approx(0.5, abs=0.02) and model.config.num_hidden_layers == layers[-1] + 1


def test_the_former_name_of_a_layout_works_with_a_note(
    masks_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    export_checkpoint(masks_repository, tmp_path / "new", layout="zeroed")
    assert "layout" not in capsys.readouterr().err
    export_checkpoint(masks_repository, tmp_path / "python", layout="masked")
    assert capsys.readouterr().err.count("layout masked is called zeroed now") == 1
    assert main(["export", str(masks_repository), "--layout", "masked", "-o", str(tmp_path / "cli")]) == 0
    assert "layout masked is called zeroed now" in capsys.readouterr().err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("new", "python", "cli")]
    assert weights[0] == weights[1] == weights[2]
    with pytest.raises(HeaprError, match="layout 'ragged' is not one of compact, plain, zeroed"):
        export_checkpoint(masks_repository, tmp_path / "out", layout="ragged")


def test_stages_are_passed_in_order() -> None:
    """What one stage makes of a tensor goes through the next one, tensor by tensor."""

    class Halves:
        def tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
            low, high = tensor.chunk(2)
            return {f"{name}.low": low, f"{name}.high": high}

    class Doubled:
        def tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
            return {name: 2 * tensor}

    made = through([Doubled(), Halves()], "w", torch.arange(4))
    assert {name: tensor.tolist() for name, tensor in made.items()} == {"w.low": [0, 2], "w.high": [4, 6]}
    assert through([], "w", torch.arange(2)).keys() == {"w"}


def test_the_export_knows_no_repair() -> None:
    """The repair is handed in: nothing of `prune/export` or `prune/report` imports it."""
    package = Path(export.__file__).parent.parent
    for path in [*(package / "export").glob("*.py"), *(package / "report").glob("*.py")]:
        assert "heapr_vllm.prune.repair" not in imports_of(path), path


def imports_of(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(line for line in lines if line.lstrip().startswith(("import ", "from ")))
