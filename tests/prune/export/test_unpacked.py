# SPDX-License-Identifier: Apache-2.0
"""`heapr unpack`: what it makes of a compact checkpoint is the zeroed checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from heapr_vllm.cli.main import main
from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import INDEX_FILE, Checkpoint
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.names import ExpertTensor
from heapr_vllm.formats.quantized import dequantize
from heapr_vllm.prune import export_checkpoint
from heapr_vllm.prune.export.unpacked import unpack
from heapr_vllm.prune.repair.fit import RepairSettings
from heapr_vllm.prune.report.summary import load_report
from tests import conftest, quantized_models, tiny_models


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v2", "deepseek_v3"])
def test_it_is_the_zeroed_checkpoint(family: str, corpus: Path, tmp_path: Path) -> None:
    """Every byte of it, from compact and from masks, with one shard and with many, draft layers too."""
    base = tiny_models.save(family, tmp_path / "base")
    if family == "qwen3_moe":
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="100KB")
        (base / "model.safetensors").unlink()
        assert len(Checkpoint(base).shards) > 5
    conftest.prune(base, corpus, tmp_path, 0.4)
    export_checkpoint(tmp_path / "masks", tmp_path / "zeroed", layout="zeroed")
    for source in ("compact", "masks"):
        assert main(["unpack", str(tmp_path / source), "-o", str(tmp_path / f"from-{source}")]) == 0
        assert contents(tmp_path / f"from-{source}") == contents(tmp_path / "zeroed")


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_8_bit_experts_become_codes_times_scales(scheme: str, masks_repository: Path, tmp_path: Path) -> None:
    export_checkpoint(masks_repository, tmp_path / "compact", quantize=scheme)
    unpack(tmp_path / "compact", tmp_path / "full")
    export_checkpoint(masks_repository, tmp_path / "zeroed", layout="zeroed")
    compact, full, zeroed = (load_file(tmp_path / name / "model.safetensors") for name in ("compact", "full", "zeroed"))
    keep = NeuronMasks.from_pretrained(masks_repository).keep
    stored = Checkpoint(tmp_path / "compact").expert_scheme
    assert full.keys() == zeroed.keys()
    for name, tensor in full.items():
        where = ExpertTensor.parse(name)
        if where is None:
            assert torch.equal(tensor, zeroed[name])
            continue
        codes = compact[name]
        values = dequantize(codes, compact[f"{name}_scale"], stored.block(where.shard, tuple(codes.shape)))
        kept = keep[where.prefix][where.expert]
        found = (tensor, values) if where.shard != "w2" else (tensor.T, values.T)
        assert torch.equal(found[0][kept], found[1]) and not found[0][~kept].any()
    assert "quantization_config" not in json.loads((tmp_path / "full" / "config.json").read_text())


@pytest.mark.parametrize("stored", quantized_models.FORMATS)
def test_kept_codes_of_a_base_model(stored: str, qwen3: Path, masks_repository: Path, tmp_path: Path) -> None:
    """Quantized attention is dequantised too."""
    base = quantized_models.quantized(qwen3, tmp_path / "base", stored)
    exported = quantized_models.dequantized(base, tmp_path / "values")
    for layout, model in (("compact", base), ("zeroed", exported)):
        export_checkpoint(masks_repository, tmp_path / layout, model=str(model), layout=layout)
    unpack(tmp_path / "compact", tmp_path / "full")
    assert contents(tmp_path / "full") == contents(tmp_path / "zeroed")


@pytest.mark.filterwarnings("ignore:.*experts to repair see fewer tokens")
def test_repaired_weights_and_their_record_stay(masks_repository: Path, tmp_path: Path) -> None:
    for layout in ("compact", "zeroed"):
        export_checkpoint(masks_repository, tmp_path / layout, layout=layout, repair=RepairSettings())
    unpack(tmp_path / "compact", tmp_path / "full")
    assert load_report(tmp_path / "full").repair is not None
    assert contents(tmp_path / "full") == contents(tmp_path / "zeroed")


def test_from_the_hub(masks_repository: Path, tmp_path: Path) -> None:
    """Out of its cache, whose snapshots are links."""
    export_checkpoint(masks_repository, tmp_path / "compact")
    cached = tmp_path / "hub" / "models--you--model"
    snapshot = cached / "snapshots" / ("0" * 40)
    shutil.copytree(tmp_path / "compact", snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(snapshot.name)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "heapr_vllm", "unpack", "you/model", "-o", str(tmp_path / "full")]
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    unpack(tmp_path / "compact", tmp_path / "wanted")
    assert contents(tmp_path / "full") == contents(tmp_path / "wanted")


def test_refused(masks_repository: Path, qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    export_checkpoint(masks_repository, tmp_path / "compact")
    export_checkpoint(masks_repository, tmp_path / "zeroed", layout="zeroed")
    for arguments, message in (
        ([qwen3], "is not packed: its config.json names no plugin"),
        ([tmp_path / "zeroed"], "any engine loads it as it is"),
        ([tmp_path / "compact", "--model", qwen3], "has weights of its own; leave --model out"),
        ([masks_repository, "--model", tmp_path / "gone"], "the base model of .* cannot be read"),
    ):
        with pytest.raises(HeaprError, match=message):
            unpack_arguments(arguments, tmp_path / "full")
        assert main(["unpack", *map(str, arguments), "-o", str(tmp_path / "full")]) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "full").exists()
    unpack(tmp_path / "compact", tmp_path / "full")
    with pytest.raises(HeaprError, match="already exists; pass --overwrite"):
        unpack(tmp_path / "compact", tmp_path / "full")
    with pytest.raises(HeaprError, match="is an input"):
        unpack(tmp_path / "compact", tmp_path / "compact", overwrite=True)


def unpack_arguments(arguments: list, output: Path) -> None:
    unpack(arguments[0], output, model=str(arguments[2]) if len(arguments) > 1 else None)


def test_damage_is_named_and_leaves_nothing(masks_repository: Path, tmp_path: Path) -> None:
    export_checkpoint(masks_repository, tmp_path / "compact")
    weights = tmp_path / "compact" / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({**tensors, name: tensors[name][1:]}, weights, metadata={"format": "pt"})
    with pytest.raises(HeaprError, match=rf"{name} is \[\d+, 64\], its mask keeps \d+ neurons; create or download"):
        unpack(tmp_path / "compact", tmp_path / "full")
    lacking = {name: tensor for name, tensor in tensors.items() if ".layers.2.mlp.experts" not in name}
    save_file(lacking, weights, metadata={"format": "pt"})
    index = json.loads((tmp_path / "compact" / INDEX_FILE).read_text())
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if name in lacking}
    (tmp_path / "compact" / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(HeaprError, match="lacks weights or masks of experts of model.layers.2.mlp.experts"):
        unpack(tmp_path / "compact", tmp_path / "full")
    assert not [path for path in tmp_path.iterdir() if "full" in path.name], "nothing half-written"


def test_masks_of_other_widths_are_refused(masks_repository: Path, tmp_path: Path) -> None:
    """Masks that were put beside weights that were cut by others."""
    export_checkpoint(masks_repository, tmp_path / "compact")
    masks = NeuronMasks.from_pretrained(masks_repository)
    other = replace(masks, keep={prefix: ~keep for prefix, keep in masks.keep.items()})
    other.save_pretrained(tmp_path / "compact")
    with pytest.raises(HeaprError, match="differs from the masks_sha256 in config.json"):
        unpack(tmp_path / "compact", tmp_path / "full")
    shutil.rmtree(tmp_path / "compact" / "heapr")
    with pytest.raises(HeaprError, match="holds no heapr/masks.safetensors"):
        unpack(tmp_path / "compact", tmp_path / "full")
