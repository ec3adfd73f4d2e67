# SPDX-License-Identifier: Apache-2.0
"""`--worst-case`: the source that loses most loses as little as can be, against brute force and the bound."""

from itertools import combinations

import pytest
import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune import NeuronMoments
from heapr_vllm.prune.calibration.moments import LayerMoments
from heapr_vllm.prune.selection.budget import Budget
from heapr_vllm.prune.selection.selector import Selector
from heapr_vllm.prune.selection.worst_case import worst_case

PREFIX = "model.layers.{}.mlp.experts"


def mix(names: tuple[str, ...], layers: int, experts: int, width: int, seed: int = 0) -> NeuronMoments:
    """Moments of sources that do not agree on which neurons matter, of different numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    sources, records = {}, []
    for number, name in enumerate(names, 1):
        found = {}
        for layer in range(layers):
            values = torch.rand(3, experts, width, generator=generator).double().pow(4) * number
            ones = torch.ones(experts, width, dtype=torch.float64)
            tokens = torch.randint(1, 50, (experts,), generator=generator)
            outputs = torch.ones(2, experts, dtype=torch.float64)
            found[PREFIX.format(layer)] = LayerMoments(tokens, *values, ones, ones, ones, *outputs)
        sources[name] = found
        records.append({"name": name, "tokens": 100 * number, "predictions": 90 * number})
    total = sum(record["tokens"] for record in records)
    predictions = sum(record["predictions"] for record in records)
    metadata = {"sources": records, "calibration_tokens": total, "loss_tokens": predictions}
    return NeuronMoments.of_sources(sources, metadata)


def test_against_brute_force() -> None:
    """Of 8 neurons 4 go: all 70 choices, the best of which rounds the bound up by less than one neuron."""
    moments = mix(("a", "b", "c"), layers=1, experts=2, width=4)
    found = worst_case(moments, Budget(stored=0.5), align=1, protect=0.0)
    losses = {
        name: 0.5 * layers[PREFIX.format(0)].fisher.flatten() / moments.source_predictions()[name]
        for name, layers in moments.sources.items()
    }
    choices = [
        max(float(loss[list(removed)].sum()) for loss in losses.values()) for removed in combinations(range(8), 4)
    ]
    assert found.bound <= min(choices) + 1e-12
    assert found.largest == pytest.approx(min(choices), rel=0.15)


@pytest.mark.parametrize("budget", [Budget(stored=0.25), Budget(stored=0.5), Budget(executed=0.3)])
def test_better_than_the_mix_and_near_the_bound(budget: Budget) -> None:
    moments = mix(("code", "chat", "wiki"), layers=3, experts=8, width=64)
    selector = Selector(moments, "fisher", protect=0.0)
    of_the_mix = max(selector.source_losses(selector.keep(budget)[0]).values())
    found = worst_case(moments, budget, protect=0.0)
    assert found.bound <= found.largest < of_the_mix
    assert found.largest - found.bound < 0.05 * found.largest
    kept, _ = found.selector.keep(budget)
    assert found.selector.source_losses(kept) == pytest.approx(found.losses)
    assert sum(found.weights.values()) == pytest.approx(1)
    assert found.selector.masks(budget).metadata["worst_case"]["largest"] == found.largest


def test_one_source_has_no_worst_case() -> None:
    with pytest.raises(HeaprError, match="needs the moments of several sources; calibrate with --dataset A=SPEC"):
        worst_case(mix(("all",), 1, 2, 32), Budget(stored=0.5))


def test_layers_that_stay_whole() -> None:
    moments = mix(("a", "b"), layers=3, experts=4, width=32)
    for options in ({"include_layers": {1}}, {"exclude_layers": {0, 2}}):
        widths = Selector(moments, "fisher", protect=0.0, **options).masks(Budget(stored=0.2)).widths
        assert [bool((own == 32).all()) for own in widths.values()] == [True, False, True]
    with pytest.raises(HeaprError, match="one width for all layers, so none can stay whole; use layer-uniform"):
        Selector(moments, "fisher", scope="uniform", exclude_layers={1})
    with pytest.raises(HeaprError, match="layer 3 has no routed experts; name some of 0 to 2"):
        Selector(moments, "fisher", exclude_layers={3})
    with pytest.raises(HeaprError, match="out of reach"):
        Selector(moments, "fisher", protect=0.0, include_layers={1}).masks(Budget(stored=0.5))
