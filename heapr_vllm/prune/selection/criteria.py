# SPDX-License-Identifier: Apache-2.0
"""Saliency criteria: moments to one score per neuron, higher is kept.

A criterion is a function from NeuronMoments to float64 [E, I] by MoE module prefix. Two kinds must not be confused: a
mean over the tokens of the expert says what a neuron does when its expert runs (`heapr`, `reap`), a sum over all tokens
also says how often that is (`fisher`, `heapr-frequency`, `energy`). Only a sum can be weighed against costs per token,
as a FLOPs budget does.
"""

from collections.abc import Callable

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune.calibration.moments import NeuronMoments

Saliency = dict[str, torch.Tensor]


def heapr(moments: NeuronMoments) -> Saliency:
    """1/2 mean(h^2) mean((dl/dh)^2) over the expert's tokens: the paper's score (arXiv 2509.22299, Eq. 15-16)."""
    return moments.saliency()


def fisher(moments: NeuronMoments) -> Saliency:
    """1/2 sum (h dl/dh)^2: the predicted loss increase itself, in nats over the calibration text.

    Fisher pruning (Theis et al., arXiv 1801.05787) with neurons as units. Unlike the paper's product of two means it
    sees whether the tokens that excite a neuron are those the loss is sensitive to.
    """
    return moments.loss_increase()


def heapr_frequency(moments: NeuronMoments) -> Saliency:
    """The paper's score times the expert's token count: a sum like `fisher`, with h^2 and (dl/dh)^2 independent.

    Per executed FLOP this is the paper's score again, so a FLOPs budget on it cuts the paper's own ranking.
    """
    return {prefix: scores * moments.tokens[prefix].double()[:, None] for prefix, scores in heapr(moments).items()}


def energy(moments: NeuronMoments) -> Saliency:
    """sum h^2 ||w||^2 with w the neuron's down_proj column: the energy it adds to the output, without gradients.

    In the manner of CAMERA (arXiv 2508.02322), which ranks micro-experts by activation norm times ||w|| in every layer.
    """
    moments.require(("down_norm",), "criterion energy")
    return {
        prefix: sums.double() * moments.down_norm[prefix].double() ** 2
        for prefix, sums in moments.activation_sq.items()
    }


def magnitude(moments: NeuronMoments) -> Saliency:
    """Product of the norms of a neuron's gate row, up row and down column: no data at all."""
    moments.require(("gate_norm", "up_norm", "down_norm"), "criterion magnitude")
    return {
        prefix: gate.double() * moments.up_norm[prefix].double() * moments.down_norm[prefix].double()
        for prefix, gate in moments.gate_norm.items()
    }


def random(moments: NeuronMoments, seed: int = 0) -> Saliency:
    """Uniform noise, the floor of every comparison."""
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix: torch.rand(sums.shape, generator=generator, dtype=torch.float64)
        for prefix, sums in moments.activation_sq.items()
    }


def reap(moments: NeuronMoments) -> Saliency:
    """Mean over the expert's tokens of router weight times ||E(x)||, the same for all its neurons.

    REAP (arXiv 2510.13999) removes whole experts by this score, equally many in every layer: use scope "layer".
    """
    moments.require(("routed_norm",), "criterion reap")
    return {
        prefix: (moments.routed_norm[prefix].double() / tokens.clamp(min=1))[:, None]
        .expand(moments.activation_sq[prefix].shape)
        .clone()
        for prefix, tokens in moments.tokens.items()
    }


CRITERIA: dict[str, Callable[[NeuronMoments], Saliency]] = {
    "heapr": heapr,
    "fisher": fisher,
    "heapr-frequency": heapr_frequency,
    "energy": energy,
    "magnitude": magnitude,
    "random": random,
    "reap": reap,
}


def score(moments: NeuronMoments, criterion: str, seed: int = 0) -> Saliency:
    """Saliency under the named criterion; `seed` is for "random".

    Raises HeaprError if there is no such criterion, the moments lack what it needs, or a score is not finite.
    """
    if criterion not in CRITERIA:
        raise HeaprError(f"criterion {criterion!r} is not one of {', '.join(CRITERIA)}")
    saliency = random(moments, seed) if criterion == "random" else CRITERIA[criterion](moments)
    for prefix, scores in saliency.items():
        if not scores.isfinite().all():
            raise HeaprError(f"{prefix} has saliency that is not finite; calibrate again with --dtype float32")
    return saliency
