# SPDX-License-Identifier: Apache-2.0
"""Saliency criteria: moments to one score per neuron, higher is kept.

A criterion is a function from LayerMoments to float64 [E, I]. Two kinds must not be confused: a mean over the tokens of
the expert says what a neuron does when its expert runs (`heapr`, `reap`), a sum over all tokens also says how often
that is (`fisher`, `heapr-frequency`, `energy`). Only a sum can be weighed against costs per token, as a FLOPs budget
does.
"""

from collections.abc import Callable
from functools import partial

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune.calibration.moments import LayerMoments, NeuronMoments


def heapr(layer: LayerMoments) -> torch.Tensor:
    """Computes 1/2 mean(h^2) mean((dl/dh)^2) over the expert's tokens: the paper's (arXiv 2509.22299, Eq. 15-16)."""
    return layer.saliency()


def fisher(layer: LayerMoments) -> torch.Tensor:
    """Computes 1/2 sum (h dl/dh)^2: the predicted loss increase itself, in nats over the calibration text.

    Fisher pruning (Theis et al., arXiv 1801.05787) with neurons as units. Unlike the paper's product of two means it
    sees whether the tokens that excite a neuron are those the loss is sensitive to.
    """
    return layer.loss_increase()


def heapr_frequency(layer: LayerMoments) -> torch.Tensor:
    """Multiplies the paper's score by the expert's token count: a sum, with h^2 and (dl/dh)^2 independent.

    Per executed FLOP this is the paper's score again, so a FLOPs budget on it cuts the paper's own ranking.
    """
    return heapr(layer) * layer.tokens.double()[:, None]


def energy(layer: LayerMoments) -> torch.Tensor:
    """Computes sum h^2 ||w||^2, w being the down_proj column: the energy a neuron adds to the output, no gradients.

    In the manner of CAMERA (arXiv 2508.02322), which ranks micro-experts by activation norm times ||w|| in every layer.
    """
    (down,) = layer.required(("down_norm",), "criterion energy")
    return layer.activation_sq.double() * down.double() ** 2


def magnitude(layer: LayerMoments) -> torch.Tensor:
    """Multiplies the norms of a neuron's gate row, up row and down column: no data at all."""
    gate, up, down = layer.required(("gate_norm", "up_norm", "down_norm"), "criterion magnitude")
    return gate.double() * up.double() * down.double()


def random(layer: LayerMoments, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draws uniform noise, the floor of every comparison."""
    return torch.rand(layer.fisher.shape, generator=generator, dtype=torch.float64)


def reap(layer: LayerMoments) -> torch.Tensor:
    """Averages router weight times ||E(x)|| over the expert's tokens, the same for all its neurons.

    REAP (arXiv 2510.13999) removes whole experts by this score, equally many in every layer: use scope "layer".
    """
    (routed,) = layer.required(("routed_norm",), "criterion reap")
    mean = routed.double() / layer.tokens.clamp(min=1)
    return mean[:, None].expand(layer.fisher.shape).clone()


CRITERIA: dict[str, Callable[[LayerMoments], torch.Tensor]] = {
    "heapr": heapr,
    "fisher": fisher,
    "heapr-frequency": heapr_frequency,
    "energy": energy,
    "magnitude": magnitude,
    "random": random,
    "reap": reap,
}


def score(moments: NeuronMoments, criterion: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Scores all neurons by the named criterion, prefix -> float64 [E, I]; `seed` is for "random".

    Raises HeaprError if there is no such criterion, the moments lack what it needs, or a score is not finite.
    """
    if criterion not in CRITERIA:
        raise HeaprError(f"criterion {criterion!r} is not one of {', '.join(CRITERIA)}")
    of_layer = CRITERIA[criterion]
    if criterion == "random":
        of_layer = partial(random, generator=torch.Generator().manual_seed(seed))
    saliency = {prefix: of_layer(layer) for prefix, layer in moments.layers.items()}
    for prefix, scores in saliency.items():
        if not scores.isfinite().all():
            raise HeaprError(f"{prefix} has saliency that is not finite; calibrate again with --dtype float32")
    return saliency
