# SPDX-License-Identifier: Apache-2.0
"""Closed-form repair: down_proj is refitted so that the kept neurons reproduce the unpruned expert's output.

With W [H, I] the expert's down_proj, h [I] its SwiGLU product, p its router weight, S = sum over tokens of p^2 h h^T,
kept neurons K and removed ones R, the refitted columns minimise

    sum p^2 |W h - W'_K h_K|^2 + lambda |W'_K - W_K|^2,

a ridge regression centred on the original weights, whose solution is W'_K = W_K + W_R B with the compensation
B = S_RK (S_KK + lambda I)^-1: what the kept neurons say about each removed one. B does not depend on W. The prior is
worth as much as PRIOR |K| average tokens, lambda = PRIOR |K| / T * trace(S_KK) / |K| for an expert that saw T tokens:
without tokens W' = W, with many tokens W' is the least-squares optimum. Compensation by least squares goes back to the
optimal brain surgeon (Hassibi and Stork, 1993).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.prune.models.experts import expert_modules
from heapr_vllm.prune.models.pruned import applied
from heapr_vllm.prune.repair.second_moments import SecondMoment, SecondMoments

PRIOR = 3.0  # weight of the original weights, in tokens per kept neuron
MIN_RIDGE = 1e-6  # of trace(S_KK) / |K|: above the rounding of sums of float32 products

Compensations = dict[str, dict[int, torch.Tensor]]  # MoE module prefix, expert: B float64 [|R|, |K|]


def repairable(masks: NeuronMasks, *, whole: bool = False) -> dict[str, list[int]]:
    """Finds experts that lose some of their neurons, not all and, but for `whole`, not none; prefix -> experts."""
    found: dict[str, list[int]] = {}
    for prefix, widths in masks.widths.items():
        chosen = (widths > 0) & (whole | (widths < masks.keep[prefix].shape[1]))
        if chosen.any():
            found[prefix] = chosen.nonzero()[:, 0].tolist()
    return found


def ridged(moment: SecondMoment, keep: torch.Tensor, prior: float = PRIOR) -> torch.Tensor | None:
    """Computes S_KK + lambda I float64 [|K|, |K|] for `keep` bool [I]; None if no token says anything.

    Raises HeaprError if the second moment is not finite.
    """
    if not moment.sums.isfinite().all():
        raise HeaprError("the activations are not finite; calibrate again with --dtype float32")
    keep = keep.to(moment.sums.device)
    kept = moment.sums[keep][:, keep]
    power = kept.diagonal().mean()
    if not moment.tokens or power == 0:
        return None
    kept.diagonal().add_(power * max(prior * len(kept) / moment.tokens, MIN_RIDGE))
    return kept


def compensation(moment: SecondMoment, keep: torch.Tensor, prior: float = PRIOR) -> torch.Tensor:
    """Computes B float64 [|R|, |K|] for `keep` bool [I]. Raises HeaprError if the second moment is not finite."""
    return solved(ridged(moment, keep, prior), moment, keep)


def solved(kept: torch.Tensor | None, moment: SecondMoment, keep: torch.Tensor) -> torch.Tensor:
    """Does as `compensation`, from what `ridged` computed."""
    keep = keep.to(moment.sums.device)
    crossed = moment.sums[keep][:, ~keep]
    if kept is None:
        return torch.zeros_like(crossed.T)
    return torch.cholesky_solve(crossed, torch.linalg.cholesky(kept)).T


def compensate(weight: torch.Tensor, keep: torch.Tensor, compensation: torch.Tensor) -> torch.Tensor:
    """Refits the kept columns of `weight`, a down_proj [H, I], in its own dtype; the removed ones stay."""
    keep, compensation = keep.to(weight.device), compensation.to(weight.device)
    refitted = weight.to(torch.float64, copy=True)
    refitted[:, keep] += refitted[:, ~keep] @ compensation.double()
    return refitted.to(weight.dtype)


def output_error(weight: torch.Tensor, moment: SecondMoment, keep: torch.Tensor, columns: torch.Tensor) -> float:
    """Sums over tokens the squared error of the expert's weighted output with `columns` [H, |K|] for its neurons."""
    error = -weight.double()
    error[:, keep.to(weight.device)] += columns.double()
    return ((error @ moment.sums) * error).sum().item()


def compensations(moments: SecondMoments, masks: NeuronMasks, prior: float = PRIOR) -> Compensations:
    """Computes B of every expert that loses some neurons."""
    found: Compensations = {}
    for prefix, experts in repairable(masks).items():
        keep, seen = masks.keep[prefix], moments[prefix]
        found[prefix] = {expert: compensation(seen[expert], keep[expert], prior) for expert in experts}
    return found


@contextmanager
def repaired(model: PreTrainedModel, masks: NeuronMasks, found: Compensations) -> Generator[PreTrainedModel]:
    """Does `applied(masks, model)` with the kept columns refitted; the model's weights are restored on exit."""
    weights = {prefix: module.down_proj.data for prefix, module in expert_modules(model).items() if prefix in found}
    originals = {prefix: weight.clone() for prefix, weight in weights.items()}
    try:
        for prefix, experts in found.items():
            for expert, matrix in experts.items():
                weights[prefix][expert] = compensate(weights[prefix][expert], masks.keep[prefix][expert], matrix)
        with applied(masks, model):
            yield model
    finally:
        for prefix, weight in weights.items():
            weight.copy_(originals[prefix])
