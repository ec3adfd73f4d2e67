# SPDX-License-Identifier: Apache-2.0
"""Super experts are found by their outputs and keep a floor."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune import NeuronMoments
from heapr_vllm.prune.selection.selector import select
from heapr_vllm.prune.selection.super_experts import super_experts

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


@pytest.fixture
def moments(calibration: Path) -> NeuronMoments:
    """Expert 3 of the second layer has outputs 100 times larger and the lowest saliency of all."""
    plain = NeuronMoments.from_pretrained(calibration)
    plain[SECOND].peak_norm[3] *= 100
    plain[SECOND].gradient_sq[3] *= 1e-9
    return plain


def with_peaks(moments: NeuronMoments, peaks: dict[str, torch.Tensor]) -> NeuronMoments:
    layers = {prefix: replace(layer, peak_norm=peaks[prefix]) for prefix, layer in moments.layers.items()}
    return replace(moments, layers=layers)


def test_outliers_only(moments: NeuronMoments, calibration: Path) -> None:
    assert not any(found.any() for found in super_experts(NeuronMoments.from_pretrained(calibration)).values())
    found = super_experts(moments)
    assert found[SECOND].nonzero().tolist() == [[3]] and not found[FIRST].any()


def test_large_layers_and_small_outliers_are_none(moments: NeuronMoments) -> None:
    """A layer whose outputs are all large has no outlier; nor is an outlier of a layer one if the model has larger."""
    scaled = zip(moments.layers.items(), (50.0, 0.01, 1.0), strict=True)
    peaks = {prefix: layer.peak_norm * scale for (prefix, layer), scale in scaled}
    assert not any(found.any() for found in super_experts(with_peaks(moments, peaks)).values())


def test_experts_without_a_token_do_not_lower_the_median(moments: NeuronMoments) -> None:
    peaks = {prefix: layer.peak_norm.clone() for prefix, layer in moments.layers.items()}
    for norms in peaks.values():
        norms[-3:] = 0
    assert super_experts(with_peaks(moments, peaks))[SECOND].nonzero().tolist() == [[3]]


def test_protected_experts_keep_a_floor(moments: NeuronMoments) -> None:
    default = select(moments, 0.5)
    assert default.widths[SECOND][3] == 32, "half of 64 neurons"
    assert default.metadata["protected"] == [f"{SECOND}.3"]
    assert abs(default.sparsity - 0.5) < 0.02
    assert select(moments, 0.5, protect=0.4).widths[SECOND][3] == 32, "26 neurons, rounded up to blocks of 16"
    assert select(moments, 0.5, protect=1.0).widths[SECOND][3] == 64
    off = select(moments, 0.5, protect=0)
    assert off.widths[SECOND][3] == 0 and off.metadata["protected"] == []


def test_bad_fraction(moments: NeuronMoments) -> None:
    with pytest.raises(HeaprError, match="--protect 8.0 is not between 0 and 1"):
        select(moments, 0.5, protect=8.0)
