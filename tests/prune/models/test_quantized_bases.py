# SPDX-License-Identifier: Apache-2.0
"""Base models in 8 and 4 bits are calibrated as the values of their codes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats import sizes
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.fingerprint import fingerprint, former_fingerprint, matches
from heapr_vllm.formats.quantized import dequantize
from heapr_vllm.formats.reader import TensorReader
from heapr_vllm.prune import CalibrationSettings
from heapr_vllm.prune.calibration.calibrate import calibrate
from heapr_vllm.prune.calibration.dry_run import plan
from heapr_vllm.prune.calibration.moments import SUMS
from tests import quantized_models, tiny_models


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("deepseek_v3", tmp_path_factory.mktemp("plain") / "base")


@pytest.fixture(scope="module", params=quantized_models.FORMATS)
def pair(request: pytest.FixtureRequest, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny DeepSeek-V3 in a format, and the same values in float32, dequantised entry by entry."""
    folder = tmp_path_factory.mktemp(request.param)
    sibling = quantized_models.quantized(plain, folder / "sibling", request.param)
    shutil.copytree(plain, folder / "values")
    values = quantized_models.values(sibling)
    save_file(values, folder / "values" / "model.safetensors", metadata={"format": "pt"})
    return sibling, folder / "values"


def settings(model: Path, corpus: Path, stream: bool = False) -> CalibrationSettings:
    return CalibrationSettings(
        model=str(model),
        dataset=str(corpus),
        num_calibration_samples=2,
        max_seq_length=32,
        dtype="float32",
        stream=stream,
    )


def test_moments_are_those_of_the_values(pair: tuple[Path, Path], corpus: Path, tmp_path: Path) -> None:
    sibling, values = pair
    wanted = calibrate(settings(values, corpus), tmp_path / "values")
    for stream in (False, True):
        moments = calibrate(settings(sibling, corpus, stream), tmp_path / f"sibling-{stream}")
        for prefix, tokens in wanted.tokens.items():
            assert torch.equal(moments.tokens[prefix], tokens)
            for name in SUMS:
                sums = getattr(moments[prefix], name)
                torch.testing.assert_close(sums, getattr(wanted[prefix], name), rtol=1e-6, atol=0)


def test_siblings_have_one_fingerprint(pair: tuple[Path, Path], plain: Path) -> None:
    sibling, base = (Checkpoint(path) for path in (pair[0], plain))
    assert matches(sibling, fingerprint(base)) and matches(base, fingerprint(sibling))
    assert matches(base, former_fingerprint(base)) and not matches(sibling, former_fingerprint(base))


def test_routers_of_4_bits_have_fingerprints(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_models, "LINEARS", r".*\.mlp\.gate\.weight")
    sibling = Checkpoint(quantized_models.quantized(plain, tmp_path / "sibling", "gptq-linears"))
    assert any(name.endswith(".mlp.gate.weight") for name in sibling.packed)
    for taken in (fingerprint(sibling), former_fingerprint(sibling)):
        assert matches(sibling, taken) and not matches(Checkpoint(plain), taken)


def test_blocks_at_the_edge_are_cut() -> None:
    weight = torch.ones(3, 5).to(torch.float8_e4m3fn)
    values = dequantize(weight, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), (2, 2))
    assert values.tolist() == [[1, 1, 2, 2, 3], [1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]


def test_refused(plain: Path, tmp_path: Path) -> None:
    sibling = quantized_models.quantized(plain, tmp_path / "base", "fp8-block")
    tensors = load_file(sibling / "model.safetensors")
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, sibling / "model.safetensors", metadata={"format": "pt"})
    with TensorReader(Checkpoint.resolve(sibling)) as reader, pytest.raises(HeaprError, match="has no scales"):
        reader.tensor(name)
    config = json.loads((sibling / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = None
    (sibling / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeaprError, match="one scale per tensor"):
        Checkpoint.resolve(sibling).check_unpruned()


def test_dry_run_counts_weights_as_they_are_loaded(pair: tuple[Path, Path], corpus: Path) -> None:
    """Codes become bfloat16 for the calibration; what is exported keeps them."""
    sibling, values = (Checkpoint(path) for path in pair)
    codes = list(filter(sibling.is_codes, sibling.headers))
    as_floats = 4 * sum(torch.Size(values.headers[name][1]).numel() for name in codes)
    planned = plan(CalibrationSettings(model=str(sibling.path), dataset=str(corpus), max_seq_length=64))
    assert planned["weight_bytes"] == sizes.num_bytes(values) - as_floats // 2
    assert sizes.export_bytes(sibling) < planned["weight_bytes"]
