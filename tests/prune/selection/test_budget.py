# SPDX-License-Identifier: Apache-2.0
"""The choice of blocks under stored and executed limits, against enumeration and the linear program's dual."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune import NeuronMoments
from heapr_vllm.prune.calibration.moments import LayerMoments
from heapr_vllm.prune.selection.budget import choose, stored_for_size
from heapr_vllm.prune.selection.neuron_blocks import NeuronBlocks
from heapr_vllm.prune.selection.selector import select


def instance(num_blocks: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random saliency and frequency, float64 [B]."""
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.rand(num_blocks, generator=generator, dtype=torch.float64).pow(3)
    return saliency, torch.rand(num_blocks, generator=generator, dtype=torch.float64) * 2


@settings(max_examples=80, deadline=None)
@given(max_blocks=st.integers(1, 10), share=st.floats(0.05, 0.95), seed=st.integers(0, 999))
def test_choice_is_optimal_up_to_the_block_it_cannot_split(max_blocks: int, share: float, seed: int) -> None:
    saliency, frequency = instance(10, seed)
    max_cost = float(frequency.sum()) * share
    kept, prices = choose(saliency, frequency, max_blocks, max_cost)
    assert kept.sum() <= max_blocks and frequency[kept].sum() <= max_cost
    value, best = saliency[kept].sum(), 0.0
    for bits in product((False, True), repeat=10):
        some = torch.tensor(bits)
        if some.sum() <= max_blocks and frequency[some].sum() <= max_cost:
            best = max(best, float(saliency[some].sum()))
    assert best <= value + prices.per_flop * frequency.max() + prices.per_neuron + 1e-9
    price = prices.per_flop * frequency + prices.per_neuron
    assert (saliency[kept] >= price[kept] - 1e-9).all(), "what stays is worth its price"
    assert (saliency[~kept] <= price[~kept] + 1e-9).sum() >= (~kept).sum() - 1, "what goes is not, but for one block"


def test_both_limits_bind_on_many_blocks() -> None:
    saliency, frequency = instance(5000, 1)
    for share in (0.2, 0.35, 0.5):
        max_cost = float(frequency.sum()) * share
        max_blocks = int(0.97 * choose(saliency, frequency, None, max_cost)[0].sum())
        assert frequency[choose(saliency, frequency, max_blocks, None)[0]].sum() > max_cost
        kept, prices = choose(saliency, frequency, max_blocks, max_cost)
        assert kept.sum() == max_blocks and prices.per_flop > 0 and prices.per_neuron > 0
        assert max_cost - frequency.max() < frequency[kept].sum() <= max_cost
        dual = (saliency - prices.per_flop * frequency - prices.per_neuron).clamp(min=0).sum()
        bound = dual + prices.per_flop * max_cost + prices.per_neuron * max_blocks
        assert bound >= saliency[kept].sum() >= bound - saliency.max()


def test_a_limit_with_room_has_no_price() -> None:
    saliency, frequency = instance(500, 2)
    total = float(frequency.sum())
    stored, stored_price = choose(saliency, frequency, 250, None)
    executed, executed_price = choose(saliency, frequency, None, total * 0.5)
    assert stored_price.per_flop == 0 and executed_price.per_neuron == 0
    assert torch.equal(choose(saliency, frequency, 250, total * 0.99)[0], stored)
    assert torch.equal(choose(saliency, frequency, 499, total * 0.5)[0], executed)
    assert saliency[executed].sum() / frequency[executed].sum() > saliency[stored].sum() / frequency[stored].sum()


def moments(seed: int = 0) -> NeuronMoments:
    """Two layers of four experts with 32 neurons; routing from 1 to 64 tokens."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for index in range(2):
        sums = torch.rand(4, 32, generator=generator)
        layers[f"model.layers.{index}.mlp.experts"] = LayerMoments(torch.tensor([1, 4, 16, 64]), sums, sums, sums)
    return NeuronMoments(layers)


@pytest.mark.parametrize("scope", ["global", "layer", "expert"])
@pytest.mark.parametrize(("sparsity", "flops"), [(None, 0.3), (0.4, 0.6), (0.7, 0.2), (0.4, 0.41)])
def test_masks_meet_both_budgets_with_aligned_nested_widths(scope: str, sparsity: float | None, flops: float) -> None:
    source = moments()
    masks = select(source, sparsity, flops=flops, scope=scope, align=4)
    assert masks.executed_reduction(source.tokens) >= flops
    assert sparsity is None or masks.sparsity >= sparsity - 4 / masks.num_neurons
    assert masks.metadata["flops"] == flops and masks.metadata["criterion"] == "fisher"
    assert ("prices" in masks.metadata) == (scope == "global")
    for prefix, keep in masks.keep.items():
        assert (masks.widths[prefix] % 4 == 0).all()
        for expert, kept in enumerate(keep):
            inside, outside = source[prefix].fisher[expert][kept], source[prefix].fisher[expert][~kept]
            assert not len(inside) or not len(outside) or inside.min() >= outside.max()


def test_flops_budget_cuts_busy_experts_first() -> None:
    stored, executed = select(moments(), 0.5, criterion="fisher", align=1), select(moments(), flops=0.5, align=1)
    assert executed.executed_reduction(moments().tokens) == pytest.approx(0.5, abs=0.02)
    for prefix in stored.widths:
        assert executed.widths[prefix][3] < stored.widths[prefix][3]
        assert executed.widths[prefix][0] > stored.widths[prefix][0]


def sixteen_blocks(forced: int = 0) -> NeuronBlocks:
    """64 neurons in blocks of 4, the first `forced` of which must stay."""
    floors = {"model.layers.0.mlp.experts": torch.tensor([4 * forced])}
    return NeuronBlocks.build({"model.layers.0.mlp.experts": torch.rand(1, 64)}, 4, floors)


def test_target_size_is_met_within_a_block() -> None:
    metadata = {"checkpoint_bytes": 1000, "routed_bytes": 640}
    for target in (999, 900, 841, 840, 839, 500):
        stored = stored_for_size(target, metadata, sixteen_blocks())
        assert target - 40 < 1000 - 640 * stored <= target


@pytest.mark.parametrize(
    ("target", "metadata", "forced", "message"),
    [
        (
            300,
            {"checkpoint_bytes": 1000, "routed_bytes": 640},
            0,
            "out of reach: 360 B are not .* the nearest is 400 B",
        ),
        (500, {"checkpoint_bytes": 1000, "routed_bytes": 640}, 10, "out of reach: .* the nearest is 760 B"),
        (
            2**31,
            {"checkpoint_bytes": 2**30, "routed_bytes": 640},
            0,
            "2.00 GiB is no smaller than the checkpoint, 1.00 Gi",
        ),
        (300, {}, 0, "calibrate again, or pass --sparsity"),
    ],
)
def test_target_sizes_that_are_impossible(target: int, metadata: dict, forced: int, message: str) -> None:
    with pytest.raises(HeaprError, match=message):
        stored_for_size(target, metadata, sixteen_blocks(forced))
