# SPDX-License-Identifier: Apache-2.0
"""Plain torch MoE over variable-width experts: the oracle of the tests and the fallback where no kernel fits."""

import torch
import torch.nn.functional as F


def ragged_moe_reference(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
) -> torch.Tensor:
    """Sum over the top-k experts e of topk_weight * down_e(silu(gate_e x) * up_e x), [T, H] in x's dtype.

    `hidden_states` [T, H]. `w13` [2 * rows, H] and `w2` [rows, H] as in `layout.py`. `topk_weights` [T, k] float,
    `topk_ids` [T, k] int, global expert ids, -1 for nobody's. `slots` int32 [num_experts + 1]: storage slot of every
    global expert, num_slots if it is on another rank or has width 0, and in the last place, which -1 finds. `table`
    int32 [num_slots, 2]: first row and stored width. Routes are summed in fp32.
    """
    output = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    route_slots = slots[topk_ids.flatten()]
    for slot, (start, width) in enumerate(table.tolist()):
        routes = (route_slots == slot).nonzero().flatten()
        token = routes // topk_ids.shape[1]
        gate, up = F.linear(hidden_states[token], w13[2 * start : 2 * (start + width)]).chunk(2, -1)
        hidden = F.silu(gate.float()) * up.float()
        down = hidden.to(w2.dtype) @ w2[start : start + width]
        output.index_add_(0, token, down.float() * topk_weights.flatten()[routes, None].float())
    return output.to(hidden_states.dtype)
