# SPDX-License-Identifier: Apache-2.0
"""Which neurons stay: rank by saliency under a budget, in aligned blocks."""

import torch

from heapr_vllm.checkpoint import natural_order
from heapr_vllm.errors import HeaprError
from heapr_vllm.masks import NeuronMasks
from heapr_vllm.prune.moments import NeuronMoments

SCOPES = ("global", "layer", "expert")
UNROUTED = ("keep", "prune", "error")


def select(moments: NeuronMoments, sparsity: float, *, scope: str = "global", align: int = 16, min_width: int = 0,
           unrouted: str = "keep") -> NeuronMasks:
    """Masks that remove the fraction `sparsity` of routed neurons with the lowest HEAPr saliency.

    See `select_by_saliency` for the budget. Experts that saw no calibration token are kept whole (`unrouted` "keep"),
    pruned first ("prune", as the paper's code does) or refused ("error").
    """
    saliency = moments.saliency()
    for prefix, tokens in moments.tokens.items():
        silent = tokens == 0
        if unrouted == "error" and silent.any():
            raise HeaprError(f"{int(silent.sum())} experts of {prefix} saw no calibration token; calibrate on more "
                             "text, or choose --unrouted keep or prune")
        if not saliency[prefix].isfinite().all():
            raise HeaprError(f"{prefix} has saliency that is not finite; calibrate again with --dtype float32")
        saliency[prefix][silent] = torch.inf if unrouted == "keep" else -1.0
    masks = select_by_saliency(saliency, sparsity, scope=scope, align=align, min_width=min_width,
                               metadata={"criterion": "heapr", "unrouted": unrouted,
                                         "base_model": {"name_or_path": moments.metadata.get("model", ""),
                                                        "revision": moments.metadata.get("revision"),
                                                        "fingerprint": moments.metadata.get("base_fingerprint")}})
    if unrouted == "keep" and any(not keep[moments.tokens[prefix] == 0].all() for prefix, keep in masks.keep.items()):
        raise HeaprError(f"sparsity {sparsity} with scope {scope} leaves no room to keep experts without a calibration "
                         "token whole; calibrate on more text, or choose --unrouted prune")
    return masks


def select_by_saliency(saliency: dict[str, torch.Tensor], sparsity: float, *, scope: str = "global", align: int = 16,
                       min_width: int = 0, metadata: dict | None = None) -> NeuronMasks:
    """Masks from any `saliency`, prefix to [E, I], higher is kept.

    Inside an expert neurons are sorted by saliency and cut into blocks of `align`; blocks compete by their mean
    saliency across the scope ("global": the model, "layer", "expert"), so every kept count is a multiple of `align`,
    and the total is exact to one block. At least `min_width` neurons of every expert stay. Raises HeaprError if
    `sparsity` is outside (0, 1), `align` does not divide a width, or `min_width` exceeds the budget.
    """
    if not 0 < sparsity < 1:
        raise HeaprError(f"sparsity {sparsity} is not between 0 and 1; it is the fraction of routed neurons removed, "
                         "such as 0.25")
    if scope not in SCOPES:
        raise HeaprError(f"scope {scope!r} is not one of {', '.join(SCOPES)}")
    prefixes = sorted(saliency, key=natural_order)
    order, groups = {}, []
    for prefix in prefixes:
        scores = saliency[prefix].double()
        if scores.isnan().any():
            raise HeaprError(f"{prefix} has NaN saliency; calibrate again in float32")
        experts, width = scores.shape
        if width % align:
            raise HeaprError(f"align {align} does not divide the {width} neurons of {prefix}; "
                             f"use --align {torch.gcd(torch.tensor(align), torch.tensor(width)).item()}")
        ranked, order[prefix] = scores.sort(dim=-1, descending=True, stable=True)
        blocks = ranked.view(experts, width // align, align).mean(-1)
        blocks[:, : -(-min_width // align)] = torch.inf
        groups += list(blocks) if scope == "expert" else [blocks.flatten()]
    if scope == "global":
        groups = [torch.cat(groups)]
    kept_blocks = torch.cat([_keep_highest(scores, budget) for scores, budget in
                             zip(groups, _budgets(groups, 1 - sparsity), strict=True)])
    keep, start = {}, 0
    for prefix in prefixes:
        experts, width = saliency[prefix].shape
        count = experts * width // align
        chosen = kept_blocks[start : start + count].view(experts, -1).repeat_interleave(align, -1)
        keep[prefix] = torch.zeros(experts, width, dtype=torch.bool).scatter_(1, order[prefix], chosen)
        start += count
    masks = NeuronMasks(keep, {**(metadata or {}), "sparsity": sparsity, "scope": scope, "align": align,
                               "min_width": min_width})
    if any((widths < min_width).any() for widths in masks.widths.values()):
        raise HeaprError(f"min-width {min_width} keeps more than the budget of sparsity {sparsity}; lower one of them")
    return masks


def _budgets(groups: list[torch.Tensor], kept_fraction: float) -> list[int]:
    """Blocks to keep per group: cumulative rounding makes the total exact to one block."""
    ends = torch.tensor([len(group) for group in groups]).cumsum(0).double()
    kept = (ends * kept_fraction).round().long()
    return kept.diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()


def _keep_highest(scores: torch.Tensor, budget: int) -> torch.Tensor:
    """bool mask of the `budget` highest scores; equal scores go to the lower index."""
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[scores.argsort(descending=True, stable=True)[:budget]] = True
    return keep
