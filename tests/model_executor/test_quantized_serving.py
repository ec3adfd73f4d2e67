# SPDX-License-Identifier: Apache-2.0
"""Experts in 8 bits, served: what comes out is what stock vLLM computes with the values of the codes, in fp32."""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heapr_vllm.formats.quantized import BITWISE
from heapr_vllm.prune import export_checkpoint
from tests import quantized_models
from tests.conftest import prune
from tests.model_executor import engine
from tools import families

pytestmark = pytest.mark.vllm
RANKS = ("qwen3_moe+fp8-block", "qwen3_moe+int8-channel", "qwen3_moe+int8")
FP8, INT8 = "qwen3_moe+fp8-block", "qwen3_moe+int8"
EAGER = {"compilation_config": families.CUSTOM_OPS}


@pytest.fixture(scope="module")
def folders(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of every quantized model as `families.prepare` makes it."""
    root = tmp_path_factory.mktemp("quantized")
    return {name: families.prepare(name, root, corpus) for name in families.QUANTIZED}


@pytest.fixture(scope="module")
def stock(folders: dict[str, Path]) -> dict[str, families.Output]:
    return dict(families.stock(list(folders.values())))


def assert_same(name: str, found: families.Output, stock: dict[str, families.Output]) -> None:
    assert not isinstance(stock[name], str), f"stock vLLM: {stock[name]}"
    assert not isinstance(found, str), found
    assert families.same(name, found, stock[name])


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> dict[str, dict[str, families.Output]]:
    """Mode to model to output."""
    return {mode: dict(families.serve(list(folders.values()), families.MODES[mode])) for mode in ("compact", "masks")}


@pytest.mark.parametrize(("mode", "name"), product(("compact", "masks"), families.QUANTIZED))
def test_output_equals_stock(
    mode: str, name: str, served: dict[str, dict[str, families.Output]], stock: dict[str, families.Output]
) -> None:
    assert_same(name, served[mode][name], stock)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["TP=2", "EP=2", "compile"])
def test_modes(mode: str, folders: dict[str, Path], stock: dict[str, families.Output]) -> None:
    for name, found in families.serve([folders[name] for name in RANKS], families.MODES[mode]):
        assert_same(name, found, stock)


@pytest.mark.parametrize("name", [FP8, INT8])
def test_reload(name: str, folders: dict[str, Path], stock: dict[str, families.Output]) -> None:
    """Codes, scales and what is rounded while loading come again, packed from anew; after dummy weights too."""
    for arguments in ({"model": folders[name] / "compact"}, {"model": folders[name] / "masks", "load_format": "heapr"}):
        process = engine.run(**arguments, **EAGER, steps=("generate", "reload", "generate"), env=families.ENVIRONMENT)
        for found in engine.results(process):
            assert_same(name, found, stock)
    steps = ("load for real", "generate")
    process = engine.run(folders[name] / "compact", **EAGER, load_format="dummy", steps=steps, env=families.ENVIRONMENT)
    assert_same(name, engine.results(process)[-1], stock)


def test_masks_of_the_unquantized_model_serve_its_sibling(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """One calibration for all: the router is the same, so is the fingerprint."""
    plain, sibling = folders[FP8] / "plain", folders[FP8] / "base"
    prune(plain, corpus, tmp_path, sparsity=0.5)
    oracle = quantized_models.dequantized(sibling, tmp_path / "values")
    export_checkpoint(tmp_path / "masks", tmp_path / "zeroed", layout="zeroed", model=str(oracle))
    expected = engine.results(engine.run(tmp_path / "zeroed", env={"VLLM_PLUGINS": ""}))[0]
    extra = {"load_format": "heapr", "model_loader_extra_config": {"base_model": str(sibling)}}
    process = engine.run(tmp_path / "masks", **extra)
    assert "in fp8" in process.stdout + process.stderr
    assert families.same(FP8, engine.results(process)[0], expected)
    override = {"quantization_config": {"quant_method": "heapr", "masks": str(tmp_path / "masks")}}
    process = engine.run(sibling, hf_overrides=override)
    assert families.same(FP8, engine.results(process)[0], expected)


def damaged(folder: Path, output: Path, kind: str) -> Path:
    """A copy of a compact checkpoint with one tensor changed."""
    shutil.copytree(folder, output)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("gate_proj.weight") and len(tensors[name]) > 1)
    if kind == "codes":
        tensors[name] = torch.full(tensors[name].shape, 0x7F, dtype=BITWISE).view(torch.float8_e4m3fn)
    elif kind == "scales":
        del tensors[f"{name}_scale"]
    elif kind == "shape":
        tensors[f"{name}_scale"] = tensors[f"{name}_scale"][:, :1].contiguous()
    else:
        tensors[name] = tensors[name].bfloat16()
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("codes", "codes that are not numbers; download or export it again"),
        ("scales", "lacks 1 expert tensors, first w1_scale"),
        ("shape", "scales and weights do not belong together"),
        ("type", "weights and quantization_config do not belong together"),
    ],
)
def test_damage_is_refused(kind: str, message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    process = engine.run(damaged(folders[FP8] / "compact", tmp_path / kind, kind))
    assert process.returncode and message in process.stderr


def test_other_codes_than_the_bases_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """INT8 is asked for, and the base model has FP8."""
    shutil.copytree(folders[FP8] / "masks", tmp_path / "masks")
    config = json.loads((tmp_path / "masks" / "config.json").read_text())
    compact = json.loads((folders[INT8] / "compact" / "config.json").read_text())
    config["quantization_config"]["experts"] = compact["quantization_config"]["experts"]
    (tmp_path / "masks" / "config.json").write_text(json.dumps(config))
    process = engine.run(tmp_path / "masks", load_format="heapr")
    assert process.returncode and "heapr export --quantize int8" in process.stderr
