# SPDX-License-Identifier: Apache-2.0
"""Collects neuron moments while a transformers model runs forward and backward.

Hooks into Transformers' experts interface, so every family that uses it works without a name test.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune.calibration.grouped_product import grouped_product
from heapr_vllm.prune.calibration.moments import NORMS, OUTPUTS, SUMS, LayerMoments, NeuronMoments
from heapr_vllm.prune.calibration.sorted_routes import SortedRoutes
from heapr_vllm.prune.models.experts import StackedExperts, expert_modules

EXPERTS_IMPLEMENTATION = "heapr_moments"
ROWS_AT_ONCE = 2**14  # a token has one row per expert it goes to; bounds the temporaries of a layer


class _GateUp(torch.autograd.Function):
    """Products [R, 2I] of every expert's rows of `hidden_states` [T, H] with its gate and up rows.

    Keeps nothing for the way back, and gives weights no gradient. Like `_Down`.
    """

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, gate_up_proj: torch.Tensor, routes: SortedRoutes) -> torch.Tensor:
        ctx.gate_up_proj, ctx.routes = gate_up_proj, routes
        return grouped_product(routes.rows(hidden_states), gate_up_proj.mT, routes.ends)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # ty: ignore[incompatible-method-override]
        rows = grouped_product(grad.contiguous(), ctx.gate_up_proj, ctx.routes.ends)
        return ctx.routes.sum_by_token(rows), None, None


class _Tap(torch.autograd.Function):
    """Identity on h [R, I] that adds h^2, g^2 and (h g)^2, with g = dl/dh, to `layer` on the way back.

    There it gets dl/d(p h), since `_Down` leaves out the router weights p [T, top_k], and so it can tell dl/dp too.
    It comes before `_Down` because checkpointing stops repeating a layer when it has what was saved.
    """

    @staticmethod
    def forward(
        ctx, h: torch.Tensor, top_k_weights: torch.Tensor, routes: SortedRoutes, layer: LayerSums
    ) -> torch.Tensor:
        ctx.save_for_backward(h, top_k_weights)
        ctx.routes, ctx.layer = routes, layer
        return h.view_as(h)

    @staticmethod
    def backward(  # ty: ignore[incompatible-method-override]
        ctx, unweighted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        h, top_k_weights = ctx.saved_tensors
        routes = ctx.routes
        h, grad = h.double(), unweighted.double()
        product = h * grad
        grad_weights = routes.by_route(product.sum(1)).to(top_k_weights.dtype)
        weight = routes.by_row(top_k_weights)[:, None].double()
        grad = grad * weight
        product *= weight
        for index, values in enumerate((h, grad, product)):
            ctx.layer.sums[:, index] += routes.by_expert(values.square(), "sum")
        return grad.to(unweighted.dtype), grad_weights, None, None


class _Down(torch.autograd.Function):
    """Sum [T, H] of the experts' outputs for h [R, I], weighted by `top_k_weights` [T, top_k].

    Tokens and output norms are counted on the way back, like the sums of `_Tap`: under gradient checkpointing every
    forward runs twice, every backward once.
    """

    @staticmethod
    def forward(
        ctx,
        h: torch.Tensor,
        down_proj: torch.Tensor,
        top_k_weights: torch.Tensor,
        routes: SortedRoutes,
        layer: LayerSums,
    ) -> torch.Tensor:
        rows = grouped_product(h, down_proj.mT, routes.ends)
        if ctx.needs_input_grad[0]:
            ctx.down_proj, ctx.routes, ctx.layer = down_proj, routes, layer
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32).double()
            weighted = norms * routes.by_row(top_k_weights)[:, None]
            ctx.norms = routes.by_expert(weighted, "sum")[:, 0], routes.by_expert(norms, "max")[:, 0]
        return routes.sum_by_token(rows, top_k_weights)

    @staticmethod
    def backward(  # ty: ignore[incompatible-method-override]
        ctx, grad: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None]:
        routed_norm, peak_norm = ctx.norms
        ctx.layer.tokens.add_(ctx.routes.counts)
        ctx.layer.outputs[0] += routed_norm
        ctx.layer.outputs[1] = ctx.layer.outputs[1].maximum(peak_norm)
        return grouped_product(ctx.routes.rows(grad), ctx.down_proj, ctx.routes.ends), None, None, None, None


@dataclass
class LayerSums:
    """What one MoE module has added up so far, in float64 on one device.

    `tokens`: int64 [E].
    `sums`: float64 [E, 3, I] in the order of `SUMS`.
    `outputs`: float64 [2, E] in the order of `OUTPUTS`, a sum and a maximum.
    `norms`: float64 [3, E, I] in the order of `NORMS`, of the weights; zero until the layer has run (its weights may
    not be there earlier), which `has_norms` tells without a question to the device.
    """

    tokens: torch.Tensor
    sums: torch.Tensor
    outputs: torch.Tensor
    norms: torch.Tensor
    has_norms: bool = False

    @classmethod
    def zeros(cls, num_experts: int, width: int, device: torch.device) -> LayerSums:
        """Starts with nothing for `num_experts` experts of `width` neurons."""
        return cls(
            tokens=torch.zeros(num_experts, dtype=torch.int64, device=device),
            sums=torch.zeros(num_experts, len(SUMS), width, dtype=torch.float64, device=device),
            outputs=torch.zeros(len(OUTPUTS), num_experts, dtype=torch.float64, device=device),
            norms=torch.zeros(len(NORMS), num_experts, width, dtype=torch.float64, device=device),
        )

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.sums.nbytes + self.outputs.nbytes + self.norms.nbytes

    def moments(self) -> LayerMoments:
        """Copies the sums to the CPU."""
        named = dict(zip(SUMS, self.sums.unbind(1), strict=True))
        named |= dict(zip((*OUTPUTS, *NORMS), (*self.outputs, *self.norms), strict=True))
        return LayerMoments(self.tokens.cpu().clone(), **{name: values.cpu().clone() for name, values in named.items()})

    def restore(self, layer: LayerMoments) -> None:
        """Continues from `layer`. Raises HeaprError if it lacks something."""
        norms, outputs = layer.required(NORMS, "resuming"), layer.required(OUTPUTS, "resuming")
        self.tokens.copy_(layer.tokens)
        self.sums.copy_(torch.stack([layer.activation_sq, layer.gradient_sq, layer.fisher], 1))
        self.outputs.copy_(torch.stack(outputs))
        self.norms.copy_(torch.stack(norms))


class MomentCollector:
    """Sums per expert and neuron, on the device of each MoE module, or all on `device`.

    `layers`: MoE module prefix -> LayerSums.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | None = None) -> None:
        """Raises HeaprError if `model` has no experts that Transformers' experts interface reaches."""
        self.model = model
        self.prefixes: dict[nn.Module, str] = {}
        self.layers: dict[str, LayerSums] = {}
        for prefix, module in expert_modules(model).items():
            if not getattr(module, "has_gate", False) or module.has_bias or module.is_transposed:
                raise HeaprError(
                    f"{prefix} ({type(module).__name__}) is not a bias-free gated expert module behind "
                    "Transformers' experts interface; this family is not supported"
                )
            num_experts, _, width = module.down_proj.shape
            self.prefixes[module] = prefix
            self.layers[prefix] = LayerSums.zeros(num_experts, width, device or module.down_proj.device)
        if not self.prefixes:
            raise HeaprError(f"{type(model).__name__} has no routed experts; HEAPr prunes MoE models")

    @contextmanager
    def attached(self) -> Generator[None]:
        """Routes the model's experts through `forward` for the duration of the block."""
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, lambda module, *args: self.forward(module, *args))
        previous = self.model.get_experts_implementation()
        self.model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        try:
            yield
        finally:
            self.model.set_experts_implementation(previous)

    def forward(
        self,
        module: StackedExperts,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Computes the experts' output [T, H] for `hidden_states` [T, H], `top_k_index`, `top_k_weights` [T, top_k].

        On a GPU the number of launches does not depend on the number of experts, and the host waits for nothing. Every
        row, of T * top_k, keeps at most 5I values for the way back. At most R = ROWS_AT_ONCE rows are under way at a
        time, so that temporaries stay below R (2H + 2I) values of the model's dtype, R H in float32 and 4 R I in
        float64.
        """
        layer = self.layers[self.prefixes[module]]
        if not layer.has_norms:
            layer.norms.copy_(_weight_norms(module))
            layer.has_norms = True
        tokens = max(1, ROWS_AT_ONCE // top_k_index.shape[1])
        parts = zip(*(whole.split(tokens) for whole in (hidden_states, top_k_index, top_k_weights)), strict=True)
        return torch.cat([_experts(module, layer, *part) for part in parts])

    def check_reached(self) -> None:
        """Raises HeaprError if a MoE layer saw no token at all: then its experts do not run through `forward`."""
        if unseen := [prefix for prefix, layer in self.layers.items() if not layer.tokens.any()]:
            raise HeaprError(
                f"no token reached {unseen[0]} through Transformers' experts interface; "
                f"{type(self.model).__name__} is not supported"
            )

    def moments(self, metadata: dict[str, Any]) -> NeuronMoments:
        """Copies the sums so far to the CPU."""
        return NeuronMoments({prefix: layer.moments() for prefix, layer in self.layers.items()}, metadata)

    def restore(self, moments: NeuronMoments) -> None:
        """Continues from `moments`, which must be in float64 to continue exactly.

        Raises HeaprError if an older version saved them, which did not collect everything.
        """
        for prefix, layer in self.layers.items():
            layer.restore(moments[prefix])


def _experts(
    module: StackedExperts,
    layer: LayerSums,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    routes = SortedRoutes.sort(top_k_index, len(layer.tokens))
    h = module._apply_gate(_GateUp.apply(hidden_states, module.gate_up_proj, routes))
    h = _Tap.apply(h, top_k_weights, routes, layer)
    return _Down.apply(h, module.down_proj, top_k_weights.detach(), routes, layer)


@torch.no_grad()
def _weight_norms(module: StackedExperts) -> torch.Tensor:
    """Computes float64 [3, E, I]: Euclidean norms of gate rows, up rows and down columns, summed in float32."""
    gate, up = module.gate_up_proj.norm(dim=-1, dtype=torch.float32).chunk(2, -1)
    return torch.stack([gate, up, module.down_proj.norm(dim=1, dtype=torch.float32)]).double()


def check_experts(checkpoint: Checkpoint, collector: MomentCollector) -> None:
    """Raises HeaprError if the checkpoint has routed experts that the model does not expose."""
    if missing := checkpoint.expert_shapes().keys() - collector.layers.keys():
        raise HeaprError(
            f"{type(collector.model).__name__} does not expose {min(missing)} of the checkpoint; "
            "this family is not supported"
        )
