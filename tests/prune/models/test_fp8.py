# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in block-scaled FP8, as DeepSeek-V3 ships them: calibrated and exported as their dequantised weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.reader import TensorReader, dequantize
from heapr_vllm.prune import CalibrationSettings, NeuronMoments, export_checkpoint, write_masks_repository
from heapr_vllm.prune.calibration.calibrate import calibrate
from heapr_vllm.prune.calibration.moments import SUMS
from heapr_vllm.prune.selection.selector import select
from tests import tiny_models

BLOCK = 32  # 128 in released models, where a tiny model's matrices would be one block


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny DeepSeek-V3 in FP8, and the same values in bfloat16, dequantised entry by entry."""
    folder = tmp_path_factory.mktemp("fp8")
    plain = tiny_models.save("deepseek_v3", folder / "plain")
    shutil.copytree(plain, folder / "fp8")
    config = json.loads((plain / "config.json").read_text()) | {"dtype": "bfloat16"}
    (plain / "config.json").write_text(json.dumps(config))
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    (folder / "fp8" / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    stored, values = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            values[name] = stored[name] = tensor if name.endswith("bias") else tensor.bfloat16()
            continue
        rows, columns = tensor.shape
        scale = torch.rand(-(-rows // BLOCK), -(-columns // BLOCK)) / 100 + 0.001
        stored[name], stored[f"{name}_scale_inv"] = (tensor * 20).to(torch.float8_e4m3fn), scale
        of_entry = torch.tensor([[scale[i // BLOCK, j // BLOCK] for j in range(columns)] for i in range(rows)])
        values[name] = (stored[name].float() * of_entry).bfloat16()
    save_file(stored, folder / "fp8" / "model.safetensors", metadata={"format": "pt"})
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    return folder / "fp8", plain


def settings(model: Path, corpus: Path, stream: bool = False) -> CalibrationSettings:
    return CalibrationSettings(
        model=str(model),
        dataset=str(corpus),
        num_calibration_samples=2,
        max_seq_length=32,
        dtype="float32",
        stream=stream,
    )


def test_moments_are_those_of_the_dequantised_model(pair: tuple[Path, Path], corpus: Path, tmp_path: Path) -> None:
    fp8, plain = pair
    wanted = calibrate(settings(plain, corpus), tmp_path / "plain")
    for stream in (False, True):
        moments = calibrate(settings(fp8, corpus, stream), tmp_path / f"fp8-{stream}")
        for prefix, tokens in wanted.tokens.items():
            assert torch.equal(moments.tokens[prefix], tokens)
            for name in SUMS:
                sums = getattr(moments[prefix], name)
                torch.testing.assert_close(sums, getattr(wanted[prefix], name), rtol=1e-6, atol=0)


def test_export_writes_bfloat16(pair: tuple[Path, Path], corpus: Path, tmp_path: Path) -> None:
    fp8, plain = pair
    calibrate(settings(fp8, corpus), tmp_path / "calib")
    masks = select(NeuronMoments.from_pretrained(tmp_path / "calib"), sparsity=0.5)
    write_masks_repository(masks, tmp_path / "calib", tmp_path / "masks")
    for layout in ("compact", "zeroed"):
        for base in pair:
            export_checkpoint(
                tmp_path / "masks", tmp_path / base.name / layout, model=str(base), layout=layout, verify=False
            )
        written, wanted = (load_file(tmp_path / base.name / layout / "model.safetensors") for base in pair)
        assert written.keys() == wanted.keys()
        for name, tensor in written.items():
            assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name])
    Checkpoint.resolve(tmp_path / "fp8" / "zeroed").check_unquantized()


def test_blocks_at_the_edge_are_cut() -> None:
    weight = torch.ones(3, 5).to(torch.float8_e4m3fn)
    values = dequantize(weight, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), (2, 2))
    assert values.tolist() == [[1, 1, 2, 2, 3], [1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]


def test_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "base")
    with pytest.raises(HeaprError, match=r"quantized or pruned \(fp8\)"):
        Checkpoint.resolve(tmp_path / "base").check_unquantized()
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with TensorReader(Checkpoint.resolve(tmp_path / "base")) as reader, pytest.raises(HeaprError, match="has no"):
        reader.tensor(name)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = None
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeaprError, match=r"quantized or pruned \(fp8\)"):
        Checkpoint.resolve(tmp_path / "base").check_unquantized(allow_fp8=True)
