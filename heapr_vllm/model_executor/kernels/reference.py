# SPDX-License-Identifier: Apache-2.0
"""Plain torch MoE over variable-width experts: the oracle of the tests and the fallback where no kernel fits."""

import torch
import torch.nn.functional as F

from heapr_vllm.formats.quantized import PACKED_DTYPE, ExpertScheme, dequantize, unpack_nibbles
from heapr_vllm.model_executor.kernels.base import ExpertRows, RaggedKernel, Routes


class ReferenceKernel(RaggedKernel):
    """Runs everywhere but in CUDA graphs, since it reads its tables on the host."""

    name = "reference"
    adds_up_traffic = True
    takes_two_widths = True

    def layer_obstacle(self, dtype: torch.dtype, hidden_size: int, scheme: ExpertScheme | None = None) -> str | None:
        if _captures_graphs():
            return "plain torch cannot be captured in CUDA graphs; add --enforce-eager"
        return None

    def run(self, output: torch.Tensor, x: torch.Tensor, routes: Routes, experts: ExpertRows) -> None:
        output.copy_(ragged_moe_reference(x, routes, experts))


def ragged_moe_reference(x: torch.Tensor, routes: Routes, experts: ExpertRows) -> torch.Tensor:
    """Returns the sum over the top-k experts e of topk_weight * down_e(silu(gate_e x) * up_e x), [T, H] in x's dtype.

    Rows as in `storage/layout.py`, tables as `RaggedKernel.index_tables` makes them. Routes are summed in fp32. Adds to
    `experts.traffic`, if it is there.
    """
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    route_slots = routes.slots[routes.ids.flatten()]
    weights = routes.weights.flatten()
    for slot, (start, width) in enumerate(experts.table.tolist()):
        chosen = (route_slots == slot).nonzero().flatten()
        if not len(chosen):
            continue
        token = chosen // routes.ids.shape[1]
        w13, w2 = expert_weights(experts, slot, start, width)
        gate, up = F.linear(x[token], w13.to(x.dtype)).chunk(2, -1)
        hidden = F.silu(gate.float()) * up.float()
        if experts.traffic:
            experts.traffic.tokens[slot] += len(chosen)
            experts.traffic.activation_sq[slot, :width] += hidden.double().square().sum(0)
        down = hidden.to(x.dtype) @ w2.to(x.dtype)
        output.index_add_(0, token, down.float() * weights[chosen, None].float())
    return output.to(x.dtype)


def expert_weights(experts: ExpertRows, slot: int, start: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns gate and up [2 * width, H] and down [width, H] of the expert in a slot, codes dequantised to float32."""
    both, neurons = slice(2 * start, 2 * (start + width)), slice(start, start + width)
    w13, w2 = experts.w13[both], experts.w2[neurons]
    if experts.scales is None:
        return w13, w2
    w13, w2 = (unpack_nibbles(codes) if codes.dtype == PACKED_DTYPE else codes for codes in (w13, w2))
    hidden_size = experts.hidden_size
    w13_scale = experts.scales.w13[both]
    w13 = dequantize(w13, w13_scale, (1, hidden_size // w13_scale.shape[1]))
    if experts.scales.is_by_channel(hidden_size):
        return w13, w2.float() * experts.scales.w2[slot]
    w2_scale = experts.scales.w2[neurons]
    return w13, dequantize(w2, w2_scale, (1, hidden_size // w2_scale.shape[1]))


def _captures_graphs() -> bool:
    from vllm.config import CUDAGraphMode, get_current_vllm_config_or_none  # the oracle itself needs no vLLM
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        return False
    config = get_current_vllm_config_or_none()
    return config is not None and config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
