# SPDX-License-Identifier: Apache-2.0
"""Rounding with error feedback: against the textbook recursion, against nearest codes, and its codes on disk."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from heapr_vllm.formats.config import PruningConfig
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.prune import export_checkpoint
from heapr_vllm.prune.repair.fit import RepairSettings
from heapr_vllm.prune.repair.least_squares import ridged
from heapr_vllm.prune.repair.rounding import NEURONS_AT_ONCE, rounded_down
from heapr_vllm.prune.repair.second_moments import SecondMoment

HIDDEN = 64
INT4 = ExpertScheme(num_bits=4, group_size=32)
pytestmark = pytest.mark.filterwarnings("ignore:.*experts to repair see fewer tokens")


def problem(width: int, tokens: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    """A down_proj float64 [H, width] and the ridged second moment of correlated activations."""
    generator = torch.Generator().manual_seed(width)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    h = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixing
    moment = ridged(SecondMoment(tokens, h.T @ h), torch.ones(width, dtype=torch.bool))
    assert moment is not None
    return torch.randn(HIDDEN, width, generator=generator, dtype=torch.float64), moment


def nearest(weight: torch.Tensor) -> torch.Tensor:
    return INT4.dequantize(*INT4.quantize(weight.float(), "w2"), "w2")


def error(weight: torch.Tensor, moment: torch.Tensor, values: torch.Tensor) -> float:
    change = values - weight
    return float(((change @ moment) * change).sum())


def brain_surgeon(weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """The recursion without Cholesky factors: the inverse is updated after every neuron (Hassibi and Stork, 1993)."""
    left, inverse = weight.clone(), torch.linalg.inv(moment)
    values = torch.empty_like(weight)
    for neuron in moment.diagonal().argsort(descending=True, stable=True).tolist():
        values[:, neuron] = nearest(left[:, neuron, None])[:, 0]
        row = inverse[neuron] / inverse[neuron, neuron]
        left -= (left[:, neuron] - values[:, neuron])[:, None] * row
        inverse = inverse - inverse[:, neuron, None] * row
    return values


@pytest.mark.parametrize("width", [1, 7, NEURONS_AT_ONCE, NEURONS_AT_ONCE + 13])
def test_is_the_recursion_of_the_brain_surgeon(width: int) -> None:
    weight, moment = problem(width)
    values = rounded_down(weight, moment, INT4)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), brain_surgeon(weight, moment), rtol=1e-5, atol=1e-6)


def test_the_output_is_nearer_than_with_the_nearest_codes() -> None:
    weight, moment = problem(100)
    values = rounded_down(weight, moment, INT4)
    assert error(weight, moment, values) < 0.6 * error(weight, moment, nearest(weight))


def test_uncorrelated_neurons_get_the_nearest_codes() -> None:
    weight, _ = problem(20)
    moment = torch.diag(torch.arange(1, 21, dtype=torch.float64))
    assert torch.equal(rounded_down(weight, moment, INT4), nearest(weight))


@pytest.mark.parametrize("scheme", [INT4, ExpertScheme(num_bits=4, group_size=64)])
def test_the_same_codes_are_found_again(scheme: ExpertScheme) -> None:
    weight, moment = problem(50)
    values = rounded_down(weight, moment, scheme)
    assert torch.equal(scheme.dequantize(*scheme.quantize(values, "w2"), "w2"), values)


def test_export_writes_codes_that_lose_less(
    masks_repository: Path, awkward_masks: NeuronMasks, qwen3: Path, tmp_path: Path
) -> None:
    """Of 4 bits only down_proj is refitted, that of whole experts too, and the same command gives the same bytes."""
    export_checkpoint(masks_repository, tmp_path / "nearest", quantize="int4")
    for name in ("repaired", "again"):
        export_checkpoint(masks_repository, tmp_path / name, quantize="int4", repair=RepairSettings())
    plain, repaired = (load_file(tmp_path / name / "model.safetensors") for name in ("nearest", "repaired"))
    assert plain.keys() == repaired.keys()
    changed = {name.rpartition(".")[0] for name in plain if not torch.equal(plain[name], repaired[name])}
    tokens = json.loads((tmp_path / "repaired" / "heapr" / "calibration.json").read_text())["tokens"]
    assert changed == {
        f"{prefix}.{expert}.down_proj"
        for prefix, widths in awkward_masks.widths.items()
        for expert in widths.nonzero().flatten().tolist()
        if tokens[prefix][expert]
    }
    record = json.loads((tmp_path / "repaired" / "heapr" / "repair.json").read_text())
    assert 0.1 < record["output_error_removed"] < 1
    block = PruningConfig.from_dict(
        json.loads((tmp_path / "repaired" / "config.json").read_text())["quantization_config"]
    )
    assert block.expert_scheme.name == "int4" and block.repair == "least-squares"
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "repaired" / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob(".*"))
