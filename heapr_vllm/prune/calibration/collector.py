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
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune.calibration.moments import NORMS, OUTPUTS, SUMS, LayerMoments, NeuronMoments
from heapr_vllm.prune.models.experts import StackedExperts, expert_modules

EXPERTS_IMPLEMENTATION = "heapr_moments"
ROW_MULTIPLE = 64  # rows per expert are padded to it: oneDNN compiles a primitive for every new shape


class _Tap(torch.autograd.Function):
    """Identity on h [rows, I] that adds h^2, g^2 and (h g)^2, with g = dl/dh, to three [I] sums on the way back."""

    @staticmethod
    def forward(ctx, h: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h)
        ctx.sums = sums
        return h.view_as(h)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # ty: ignore[incompatible-method-override]
        (h,) = ctx.saved_tensors
        h2, g2 = h.double().square_(), grad.double().square_()
        ctx.sums += torch.stack([h2.sum(0), g2.sum(0), h2.mul_(g2).sum(0)])
        return grad, None


@dataclass(frozen=True)
class LayerSums:
    """What one MoE module has added up so far, in float64 on one device.

    `tokens`: int64 [E].
    `sums`: float64 [E, 3, I] in the order of `SUMS`.
    `outputs`: float64 [2, E] in the order of `OUTPUTS`, a sum and a maximum.
    `norms`: float64 [3, E, I] in the order of `NORMS`, of the weights; zero until the layer has run (its weights may
    not be there earlier).
    """

    tokens: torch.Tensor
    sums: torch.Tensor
    outputs: torch.Tensor
    norms: torch.Tensor

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

        Tokens and output norms are counted on the way back, like the sums: under gradient checkpointing every forward
        runs twice, every backward once.
        """

        def count(_: torch.Tensor) -> None:
            layer.tokens.add_(counts)
            layer.outputs[0] += routed_norm
            layer.outputs[1] = layer.outputs[1].maximum(peak_norm)

        layer = self.layers[self.prefixes[module]]
        if not layer.norms.any():
            layer.norms.copy_(_weight_norms(module))
        output = torch.zeros_like(hidden_states)
        routes = top_k_index.flatten()
        order = routes.argsort(stable=True)
        counts = routes.bincount(minlength=len(layer.tokens))
        routed_norm, peak_norm = torch.zeros_like(layer.outputs)
        for expert, route in enumerate(order.split(counts.tolist())):
            if not len(route):
                continue
            token = route // top_k_index.shape[1]
            x = F.pad(hidden_states[token], (0, 0, 0, -len(route) % ROW_MULTIPLE))
            h = module._apply_gate(F.linear(x, module.gate_up_proj[expert]))
            if h.requires_grad:
                h = _Tap.apply(h, layer.sums[expert])
            out = F.linear(h, module.down_proj[expert])[: len(route)]
            weight = top_k_weights.flatten()[route, None]
            norm = out.detach().float().norm(dim=-1).double()
            routed_norm[expert], peak_norm[expert] = norm @ weight.detach()[:, 0].double(), norm.max()
            output = output.index_add(0, token, (out * weight).to(output.dtype))
        if output.requires_grad:
            output.register_hook(count)
        return output

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
