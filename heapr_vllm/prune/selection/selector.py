# SPDX-License-Identifier: Apache-2.0
"""Which neurons stay: rank by a criterion under a budget, in aligned blocks."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import cached_property
from typing import Any, TypedDict

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.names import layer_index
from heapr_vllm.prune.calibration.moments import NeuronMoments
from heapr_vllm.prune.selection.budget import Budget, Prices, choose
from heapr_vllm.prune.selection.criteria import score
from heapr_vllm.prune.selection.neuron_blocks import SCOPES, SHARED_WIDTHS, NeuronBlocks
from heapr_vllm.prune.selection.super_experts import DEFAULT_PROTECTION, super_experts


class Point(TypedDict):
    """What a choice does, as far as moments tell: fractions removed, and nats per token."""

    stored_reduction: float
    executed_reduction: float
    loss_increase: float


class Selector:
    """One criterion's ranking of a model's neurons, sorted once; then masks for any budget in milliseconds."""

    def __init__(
        self,
        moments: NeuronMoments,
        criterion: str = "heapr",
        *,
        scope: str = "global",
        align: int = 16,
        min_width: int = 0,
        unrouted: str = "keep",
        protect: float | None = None,
        include_layers: Collection[int] | None = None,
        exclude_layers: Collection[int] = (),
        seed: int = 0,
    ) -> None:
        """Sorts the neurons of `moments` by `criterion` and marks those that stay in any case.

        At least `min_width` neurons of every expert and the fraction `protect` of every super expert stay, rounded up
        to blocks; None protects half of them if the moments can tell which they are, 0 none. Experts that saw no
        calibration token are kept whole (`unrouted` "keep"), pruned first ("prune", as the paper's code does) or
        refused ("error"); where experts share a width, they have it too. Layers that are not among `include_layers`
        (None: all are), and those of `exclude_layers`, stay whole. `seed` is for the criterion "random". Raises
        HeaprError if an argument is impossible.
        """
        self.moments, self.scope = moments, scope
        saliency = score(moments, criterion, seed)
        if not any(bool(values.any()) for values in saliency.values()):
            raise HeaprError(
                f"criterion {criterion} finds every neuron worthless: no gradient came through the calibration; "
                "calibrate with --dtype float32 and longer samples"
            )
        floors = {prefix: torch.full_like(tokens, min_width) for prefix, tokens in moments.tokens.items()}
        protected = self._protect(floors, protect)
        whole = _whole_layers(moments, include_layers, exclude_layers)
        if whole and scope == "uniform":
            raise HeaprError("scope uniform has one width for all layers, so none can stay whole; use layer-uniform")
        for prefix in whole:
            floors[prefix][:] = moments[prefix].fisher.shape[1]
        for prefix, tokens in moments.tokens.items():
            silent = tokens == 0
            if bool(silent.all()):
                raise HeaprError(f"no expert of {prefix} got a calibration token; calibrate again")
            if unrouted == "error" and silent.any():
                raise HeaprError(
                    f"{int(silent.sum())} experts of {prefix} saw no calibration token; calibrate on more "
                    "text, or choose --unrouted keep or prune"
                )
            if scope in SHARED_WIDTHS:
                saliency[prefix][silent] = 0.0  # they have no say in a width that they share
            else:
                saliency[prefix][silent] = torch.inf if unrouted == "keep" else -1.0
        self.blocks = NeuronBlocks.build(saliency, align, floors, moments.tokens)
        self.metadata = {
            "criterion": criterion,
            "scope": scope,
            "align": align,
            "min_width": min_width,
            "unrouted": unrouted,
            "protected": protected,
            "tokens": {prefix: tokens.tolist() for prefix, tokens in moments.tokens.items()},
            **{name: moments.metadata[name] for name in ("mix", "traffic") if name in moments.metadata},
            "base_model": {
                "name_or_path": moments.metadata.get("model", ""),
                "revision": moments.metadata.get("revision"),
                "fingerprint": moments.metadata.get("base_fingerprint"),
            },
        }

    def _protect(self, floors: dict[str, torch.Tensor], fraction: float | None) -> list[str] | None:
        """Raises `floors` for super experts and names them; None if the moments cannot tell."""
        if fraction == 0:
            return []
        if fraction is None and any(layer.peak_norm is None for layer in self.moments.layers.values()):
            return None
        fraction = DEFAULT_PROTECTION if fraction is None else fraction
        if not 0 <= fraction <= 1:
            raise HeaprError(
                f"--protect {fraction} is not between 0 and 1; it is the fraction of a super expert's "
                "neurons that stays"
            )
        names = []
        for prefix, outliers in super_experts(self.moments).items():
            floor = math.ceil(fraction * self.moments[prefix].fisher.shape[1])
            floors[prefix] = torch.where(outliers, floors[prefix].clamp(min=floor), floors[prefix])
            names += [f"{prefix}.{expert}" for expert in outliers.nonzero().flatten().tolist()]
        return names

    @cached_property
    def block_loss(self) -> torch.Tensor:
        """float64 [B]: predicted increase of the mean loss in nats per token if a block goes (`loss_increase`)."""
        losses = {prefix: layer.loss_increase() for prefix, layer in self.moments.layers.items()}
        return self.blocks.totals(losses) / self.moments.loss_tokens

    def source_losses(self, kept: torch.Tensor) -> dict[str, float]:
        """Predicts the increase of the loss per token for every source of a mix, in nats, by name."""
        found: dict[str, float] = {}
        for name, predictions in self.moments.source_predictions().items():
            layers = self.moments.sources[name]
            losses = self.blocks.totals({prefix: layer.loss_increase() for prefix, layer in layers.items()})
            found[name] = losses[~kept].sum().item() / predictions
        return found

    def keep(self, budget: Budget) -> tuple[torch.Tensor, list[Prices]]:
        """Chooses the blocks that stay, bool [B], and the prices per group. Raises HeaprError as `select`."""
        return keep_blocks(self.blocks, budget, self.scope)

    def masks(self, budget: Budget) -> NeuronMasks:
        """Makes the best masks within `budget`. Raises HeaprError if no choice of neurons reaches it."""
        kept, prices = self.keep(budget)
        return NeuronMasks(self.blocks.masks(kept), {**self.metadata, **_record(budget, prices)})

    def point(self, kept: torch.Tensor) -> Point:
        """Predicts what keeping the blocks `kept` does: both reductions and the increase of the loss per token."""
        frequency = self.blocks.frequency
        return Point(
            stored_reduction=1 - kept.double().mean().item(),
            executed_reduction=1 - (frequency[kept].sum() / frequency.sum()).item(),
            loss_increase=self.block_loss[~kept].sum().item(),
        )


def _whole_layers(
    moments: NeuronMoments, include_layers: Collection[int] | None, exclude_layers: Collection[int]
) -> list[str]:
    """Lists the MoE modules that are not to be pruned. Raises HeaprError if a layer is named that has no experts."""
    indices = {prefix: layer_index(prefix) for prefix in moments.layers}
    unknown = sorted({*(include_layers or ()), *exclude_layers} - set(indices.values()))
    if unknown:
        layers = sorted(indices.values())
        raise HeaprError(f"layer {unknown[0]} has no routed experts; name some of {layers[0]} to {layers[-1]}")
    return [
        prefix
        for prefix, index in indices.items()
        if index in exclude_layers or (include_layers is not None and index not in include_layers)
    ]


def select(
    moments: NeuronMoments,
    sparsity: float | None = None,
    *,
    flops: float | None = None,
    criterion: str | None = None,
    **options: Any,
) -> NeuronMasks:
    """Makes masks that remove the neurons with the lowest saliency under `criterion` (None: `default_criterion`).

    `sparsity`: fraction of routed neurons removed. `flops`: fraction of executed expert FLOPs per token removed, by the
    routing of the calibration text; see `budget` for the choice, and for both together. `options` as in `Selector`.
    Raises HeaprError if an argument is impossible, the moments lack something, or no choice reaches the budget.
    """
    budget = Budget(stored=sparsity, executed=flops)
    return Selector(moments, criterion or default_criterion(flops), **options).masks(budget)


def default_criterion(flops: float | None) -> str:
    """Names the paper's; for a FLOPs budget "fisher", a sum over tokens that can be weighed against costs."""
    return "heapr" if flops is None else "fisher"


def select_by_saliency(
    saliency: dict[str, torch.Tensor],
    sparsity: float,
    *,
    scope: str = "global",
    align: int = 16,
    min_width: int = 0,
    metadata: dict | None = None,
) -> NeuronMasks:
    """Makes masks from any `saliency`, prefix -> [E, I], higher is kept.

    Inside an expert neurons are sorted by saliency and cut into blocks of `align`; blocks compete by their mean
    saliency across the scope ("global": the model, "layer", "expert"), so every kept count is a multiple of `align`,
    and the total is exact to one block; in the scopes "layer-uniform" and "uniform", whose experts keep as many as the
    others of the layer or the model, below it by less than a block of each. At least `min_width` neurons of every
    expert stay. Raises HeaprError if `sparsity` is outside (0, 1), `align` does not divide a width, or `min_width`
    exceeds the budget.
    """
    budget = Budget(stored=sparsity)
    floors = {prefix: torch.full((len(scores),), min_width) for prefix, scores in saliency.items()}
    blocks = NeuronBlocks.build(saliency, align, floors)
    kept, prices = keep_blocks(blocks, budget, scope)
    return NeuronMasks(
        blocks.masks(kept),
        {**(metadata or {}), "scope": scope, "align": align, "min_width": min_width, **_record(budget, prices)},
    )


def keep_blocks(blocks: NeuronBlocks, budget: Budget, scope: str) -> tuple[torch.Tensor, list[Prices]]:
    """Chooses the blocks that stay, bool [B], when every group of the scope meets `budget`, and each group's prices.

    Raises HeaprError with the nearest reachable value if blocks that must stay leave too little.
    """
    if scope not in SCOPES:
        raise HeaprError(f"scope {scope!r} is not one of {', '.join(SCOPES)}")
    if scope not in SHARED_WIDTHS:
        groups = blocks.groups(scope)
        return _keep(groups, _counts(groups, budget.stored), blocks.saliency, blocks.frequency, budget, scope)
    column = blocks.columns(scope)
    size = column.bincount()
    saliency, frequency = column.bincount(blocks.saliency) / size, column.bincount(blocks.frequency)
    counts = [None if budget.stored is None else math.floor(len(size) * (1 - budget.stored) + 1e-9)]
    kept, _ = _keep([slice(0, len(size))], counts, saliency, frequency, budget, scope)
    return kept[column], []  # prices of columns say nothing about blocks


def _keep(
    groups: list[slice],
    counts: list[int | None],
    saliencies: torch.Tensor,
    frequencies: torch.Tensor,
    budget: Budget,
    scope: str,
) -> tuple[torch.Tensor, list[Prices]]:
    """Does as `keep_blocks` with what competes in `groups`, of each of which at most `counts` may stay."""
    kept = torch.zeros(len(saliencies), dtype=torch.bool)
    prices = []
    reach = {"sparsity": 1.0, "flops": 1.0}
    for group, count in zip(groups, counts, strict=True):
        saliency, frequency = saliencies[group], frequencies[group]
        forced, total = saliency == torch.inf, frequency.sum()
        limit = None if budget.executed is None else float(total) * (1 - budget.executed)
        if count is not None and forced.sum() > count:
            reach["sparsity"] = min(reach["sparsity"], 1 - forced.double().mean().item())
        elif limit is not None and frequency[forced].sum() > limit:
            reach["flops"] = min(reach["flops"], 1 - float(frequency[forced].sum() / total))
        else:
            kept[group], price = choose(saliency, frequency, count, limit)
            prices.append(price)
    for name, value in (("sparsity", budget.stored), ("flops", budget.executed)):
        if reach[name] < 1:
            raise HeaprError(
                f"{name} {value:g} is out of reach with scope {scope}: --min-width, --protect, layers that stay whole "
                f"and experts without a calibration token keep too much; the nearest is {_floor(reach[name])}; lower "
                "the budget or the floors, calibrate on more text, or choose --unrouted prune"
            )
    return kept, prices


def _counts(groups: list[slice], stored: float | None) -> list[int | None]:
    """Blocks that may stay per group: cumulative rounding makes the total exact to one block."""
    if stored is None:
        return [None] * len(groups)
    ends = torch.tensor([group.stop for group in groups]).double()
    return (ends * (1 - stored)).round().long().diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()


def _floor(value: float) -> float:
    """Rounds down to four digits, so that it is reachable."""
    return math.floor(value * 1e4) / 1e4


def _record(budget: Budget, prices: list[Prices]) -> dict[str, Any]:
    """Records what the masks' metadata says about the budget; prices only where one pair holds for the whole model."""
    record: dict[str, Any] = {"sparsity": budget.stored, "flops": budget.executed}
    if len(prices) == 1 and math.isfinite(prices[0].per_flop) and math.isfinite(prices[0].per_neuron):
        record["prices"] = {"per_flop": prices[0].per_flop, "per_neuron": prices[0].per_neuron}
    return record
