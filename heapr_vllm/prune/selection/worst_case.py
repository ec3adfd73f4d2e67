# SPDX-License-Identifier: Apache-2.0
"""Masks that minimise the largest predicted loss increase over the sources of a mix (`heapr prune --worst-case`).

With L_s(K) the predicted increase of source s if the blocks K stay, min over K of max over s of L_s(K) is bounded from
below by min over K of sum_s w_s L_s(K) for any weights w >= 0 that add up to 1, and the best such bound is the minimum
itself but for what whole blocks round. The inner minimum is the threshold of `budget.py` for the Fisher information
weighed by w. Weights are found by multiplicative updates (Arora, Hazan and Kale 2012): a source whose loss is high gets
more. The best choice on the way is kept, with the best bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from heapr_vllm.errors import HeaprError
from heapr_vllm.progress import progress
from heapr_vllm.prune.calibration.moments import NeuronMoments
from heapr_vllm.prune.selection.budget import Budget
from heapr_vllm.prune.selection.selector import Selector

CRITERION = "fisher"
ROUNDS = 60
GAP = 0.005  # of the largest loss: as good as the bound
STEP = 2.0  # of the first update; falls with the square root of their number


@dataclass(frozen=True)
class WorstCase:
    """The best choice found: `selector` makes it. `losses`: nats per token by source. `bound`: no choice is better.

    `weights`: of the sources' losses, by name.
    """

    selector: Selector
    weights: dict[str, float]
    losses: dict[str, float]
    bound: float

    @property
    def largest(self) -> float:
        return max(self.losses.values())

    def to_dict(self) -> dict[str, Any]:
        """Lists what the metadata of masks says of it."""
        return {"weights": self.weights, "largest": self.largest, "bound": self.bound}


def worst_case(moments: NeuronMoments, budget: Budget, **options: Any) -> WorstCase:
    """Finds the choice within `budget` whose worst source loses least; `options` as in `Selector`.

    Executed FLOPs are those of the mix that was calibrated. Raises HeaprError if `moments` have one source only, or as
    `Selector` and `Selector.keep`.
    """
    predictions = moments.source_predictions()
    if not predictions:
        raise HeaprError("--worst-case needs the moments of several sources; calibrate with --dataset A=SPEC B=SPEC")
    weights = dict.fromkeys(predictions, 1 / len(predictions))
    best, bound = None, 0.0
    for number in progress(range(ROUNDS), unit="round", desc="worst case"):
        selector = Selector(_weighed(moments, weights, predictions), CRITERION, **options)
        kept, _ = selector.keep(budget)
        losses = selector.source_losses(kept)
        bound = max(bound, sum(weights[name] * loss for name, loss in losses.items()))
        found = WorstCase(selector, weights, losses, bound)
        best = found if best is None or found.largest < best.largest else best
        if best.largest - bound <= GAP * best.largest:
            break
        weights = _updated(weights, losses, STEP / math.sqrt(number + 1))
    assert best is not None, "there are rounds"
    best = replace(best, bound=bound)
    best.selector.metadata["worst_case"] = best.to_dict()
    return best


def _updated(weights: dict[str, float], losses: dict[str, float], step: float) -> dict[str, float]:
    largest = max(losses.values())
    raised = {name: weight * math.exp(step * losses[name] / largest) for name, weight in weights.items()}
    total = sum(raised.values())
    return {name: weight / total for name, weight in raised.items()}


def _weighed(moments: NeuronMoments, weights: dict[str, float], predictions: dict[str, int]) -> NeuronMoments:
    """`moments` whose Fisher information is such that `Selector.block_loss` is the sources' losses times `weights`."""
    factors = {name: weight * moments.loss_tokens / predictions[name] for name, weight in weights.items()}
    layers = {}
    for prefix, layer in moments.layers.items():
        parts = [factor * moments.sources[name][prefix].fisher.double() for name, factor in factors.items()]
        layers[prefix] = replace(layer, fisher=sum(parts[1:], parts[0]))
    return replace(moments, layers=layers)
