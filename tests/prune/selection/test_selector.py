# SPDX-License-Identifier: Apache-2.0
"""Budgets: exact totals, aligned widths, best neurons kept, in every scope."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune import NeuronMoments, select_by_saliency
from heapr_vllm.prune.calibration.moments import LayerMoments
from heapr_vllm.prune.selection.selector import select


def scores(layers: int, experts: int, width: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{i}.mlp.experts": torch.rand(experts, width, generator=generator).pow(4) for i in range(layers)
    }


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 4),
    experts=st.integers(1, 6),
    blocks=st.integers(1, 6),
    align=st.sampled_from([1, 4, 16]),
    sparsity=st.floats(0.01, 0.99),
    scope=st.sampled_from(["global", "layer", "expert"]),
    seed=st.integers(0, 99),
)
def test_budget_and_alignment(layers, experts, blocks, align, sparsity, scope, seed) -> None:
    saliency = scores(layers, experts, blocks * align, seed)
    masks = select_by_saliency(saliency, sparsity, scope=scope, align=align)
    assert abs(masks.num_kept - (1 - sparsity) * masks.num_neurons) <= align
    for prefix, widths in masks.widths.items():
        assert (widths % align == 0).all()
        for expert, kept in enumerate(masks.keep[prefix]):
            inside, outside = saliency[prefix][expert][kept], saliency[prefix][expert][~kept]
            assert not len(inside) or not len(outside) or inside.min() >= outside.max()


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 4),
    experts=st.integers(1, 6),
    blocks=st.integers(1, 6),
    align=st.sampled_from([1, 4]),
    sparsity=st.floats(0.01, 0.99),
    scope=st.sampled_from(["layer-uniform", "uniform"]),
    seed=st.integers(0, 99),
)
def test_shared_widths(layers, experts, blocks, align, sparsity, scope, seed) -> None:
    """Equal in the layer or the model, of the budget to one column, and of the best neurons of every expert."""
    saliency = scores(layers, experts, blocks * align, seed)
    masks = select_by_saliency(saliency, sparsity, scope=scope, align=align)
    column = align * experts * (layers if scope == "uniform" else 1)
    assert -column < masks.num_kept - (1 - sparsity) * masks.num_neurons < 1e-3, "a size is never exceeded"
    assert all(len(set(widths.tolist())) == 1 for widths in masks.widths.values())
    if scope == "uniform":
        assert len({int(widths[0]) for widths in masks.widths.values()}) == 1
    for prefix, keep in masks.keep.items():
        for scored, kept in zip(saliency[prefix], keep, strict=True):
            assert kept.all() or not kept.any() or scored[kept].min() >= scored[~kept].max()


def test_layers_with_more_to_lose_get_the_larger_shared_width() -> None:
    saliency = scores(3, 4, 32, 0)
    saliency["model.layers.1.mlp.experts"] *= 100
    widths = select_by_saliency(saliency, 0.5, scope="layer-uniform", align=4).widths
    first, second, third = (int(own[0]) for own in widths.values())
    assert second > max(first, third)


def test_layers_of_different_experts_share_no_width() -> None:
    saliency = scores(1, 4, 32, 0) | {"model.layers.1.mlp.experts": torch.rand(6, 32)}
    with pytest.raises(HeaprError, match="which no scope layer-uniform covers"):
        select_by_saliency(saliency, 0.5, scope="layer-uniform", align=4)


def test_scopes_spread_the_budget_differently() -> None:
    saliency = scores(3, 4, 32, 0)
    saliency["model.layers.1.mlp.experts"] *= 100
    saliency["model.layers.2.mlp.experts"][3] *= 1e-3
    kept = {
        scope: select_by_saliency(saliency, 0.5, scope=scope, align=4).widths for scope in ("global", "layer", "expert")
    }
    assert all((widths == 16).all() for widths in kept["expert"].values())
    assert all(int(widths.sum()) == 64 for widths in kept["layer"].values())
    assert int(kept["layer"]["model.layers.2.mlp.experts"][3]) == 0
    assert int(kept["global"]["model.layers.1.mlp.experts"].sum()) > 100


def test_global_keeps_the_highest_scores() -> None:
    saliency = scores(2, 3, 20, 5)
    masks = select_by_saliency(saliency, 0.3, align=1)
    everything = torch.cat([s.flatten() for s in saliency.values()])
    threshold = everything.sort(descending=True).values[masks.num_kept - 1]
    assert masks.num_kept == 84
    for prefix, keep in masks.keep.items():
        assert torch.equal(keep, saliency[prefix] >= threshold)


def test_layers_are_taken_in_numeric_order() -> None:
    saliency = {f"model.layers.{i}.mlp.experts": torch.ones(1, 4) for i in (10, 2)}
    masks = select_by_saliency(saliency, 0.5, align=1)
    assert masks.widths["model.layers.2.mlp.experts"].item() == 4, "ties go to the earlier layer"


def test_min_width_is_a_floor() -> None:
    saliency = scores(2, 4, 32, 1)
    saliency["model.layers.0.mlp.experts"] *= 1e-6
    masks = select_by_saliency(saliency, 0.5, align=8, min_width=3)
    assert min(int(w.min()) for w in masks.widths.values()) == 8
    assert masks.num_kept == 128


def moments_with_silent_expert() -> NeuronMoments:
    sums = torch.rand(3, 16)
    sums[1] = 0
    return NeuronMoments({"model.layers.0.mlp.experts": LayerMoments(torch.tensor([5, 0, 7]), sums, sums, sums)})


@pytest.mark.parametrize(("unrouted", "width"), [("keep", 16), ("prune", 0)])
def test_unrouted_experts(unrouted: str, width: int) -> None:
    masks = select(moments_with_silent_expert(), 0.5, align=4, unrouted=unrouted)
    assert masks.widths["model.layers.0.mlp.experts"][1] == width
    assert masks.num_kept == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.0}, "not between 0 and 1"),
        ({"sparsity": 1.0}, "not between 0 and 1"),
        ({"sparsity": float("nan")}, "not between 0 and 1"),
        ({"sparsity": 0.5, "align": 5}, "align 5 does not divide the 16 neurons .* use --align 1"),
        ({"sparsity": 0.5, "scope": "world"}, "scope 'world' is not one of"),
        ({"sparsity": 0.9, "min_width": 8}, "0.9 is out of reach .* --min-width, .* the nearest is 0.3333; "),
        ({"flops": 0.9, "min_width": 8}, "flops 0.9 is out of reach .* the nearest is 0.5; "),
        ({}, "no budget is given; pass --sparsity, --target-size or --flops"),
        ({"flops": 1.5}, "flops 1.5 is not between 0 and 1"),
        ({"sparsity": 0.5, "criterion": "luck"}, "criterion 'luck' is not one of heapr, fisher"),
        ({"sparsity": 0.5, "protect": 0.5}, "--protect needs peak_norm, .* calibrate again"),
        ({"sparsity": 0.5, "criterion": "reap"}, "criterion reap needs routed_norm, .* calibrate again"),
        ({"sparsity": 0.5, "unrouted": "error"}, "1 experts of model.layers.0.mlp.experts saw no calibration token"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(HeaprError, match=message):
        select(moments_with_silent_expert(), **{"align": 4, **arguments})


def test_unrouted_experts_that_do_not_fit_the_budget() -> None:
    with pytest.raises(HeaprError, match="out of reach with scope expert: .* experts without a calibration token"):
        select(moments_with_silent_expert(), 0.5, align=4, scope="expert")


def test_overflowed_gradients_are_refused() -> None:
    moments = moments_with_silent_expert()
    moments["model.layers.0.mlp.experts"].gradient_sq[0, 0] = torch.inf
    with pytest.raises(HeaprError, match="not finite; calibrate again with --dtype float32"):
        select(moments, 0.5, align=4)
