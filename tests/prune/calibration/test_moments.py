# SPDX-License-Identifier: Apache-2.0
"""Saliency from one pass against the paper's formula with explicit gradient covariances."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune import NeuronMoments, collect_moments
from heapr_vllm.prune.calibration.moments import MOMENTS_FILE


def expert_outputs(model, blocks: torch.Tensor) -> dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]]:
    """(module, expert) to pairs of h and the expert's output with its gradient, one per block."""
    names = {module: name for name, module in model.named_modules()}
    records: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def experts(module, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for expert in range(len(module.down_proj)):
            token, position = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], module.gate_up_proj[expert]).chunk(2, -1)
            h = F.silu(gate) * up
            out = F.linear(h, module.down_proj[expert])
            out.retain_grad()
            records.setdefault((names[module], expert), []).append((h, out))
            output = output.index_add(0, token, out * top_k_weights[token, position, None])
        return output

    ALL_EXPERTS_FUNCTIONS.register("brute_force", experts)
    model.set_experts_implementation("brute_force")
    for ids in blocks:
        logits = model(ids[None]).logits[0, :-1]
        F.cross_entropy(logits, ids[1:], reduction="sum").backward()
    return dict(sorted(records.items()))


def brute_force_saliency(model, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    """Eq. 15-16: s_k = E[1/2 (h_k w_k)^T G (h_k w_k)], G = E[g g^T], g = dl/dE from autograd on the expert's output."""
    saliency: dict[str, list[torch.Tensor]] = {}
    for (name, expert), pairs in expert_outputs(model, blocks).items():
        h = torch.cat([h.detach() for h, _ in pairs]).double()
        g = torch.cat([out.grad for _, out in pairs]).double()
        w = model.get_submodule(name).down_proj[expert].detach().double()
        covariance = g.T @ g / len(g)
        scores = [
            (0.5 * (h[:, k, None] * w[:, k]) @ covariance * (h[:, k, None] * w[:, k])).sum(-1).mean()
            for k in range(w.shape[1])
        ]
        saliency.setdefault(name, []).append(torch.stack(scores))
    return {name: torch.stack(rows) for name, rows in saliency.items()}


def test_saliency_equals_the_papers_formula(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    blocks = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(1))
    fast = {prefix: layer.saliency() for prefix, layer in collect_moments(model, blocks).layers.items()}
    slow = brute_force_saliency(model, blocks)
    assert fast.keys() == slow.keys()
    for prefix in fast:
        torch.testing.assert_close(fast[prefix], slow[prefix], rtol=1e-4, atol=0)
    flat_fast = torch.cat([fast[prefix].flatten() for prefix in sorted(fast)])
    flat_slow = torch.cat([slow[prefix].flatten() for prefix in sorted(slow)])
    order = flat_slow.argsort()
    swapped = (flat_fast[order].diff() < 0) & (flat_slow[order].diff() > 1e-5 * flat_slow[order][1:])
    assert not swapped.any(), "the ranking differs beyond rounding"


def test_moments_survive_a_round_trip(calibration: Path, tmp_path: Path) -> None:
    moments = NeuronMoments.from_pretrained(calibration)
    moments.save_pretrained(tmp_path)
    assert (tmp_path / MOMENTS_FILE).read_bytes() == (calibration / MOMENTS_FILE).read_bytes()
    prefix = "model.layers.2.mlp.experts"
    assert moments[prefix].tokens.shape == (8,) and moments[prefix].fisher.shape == (8, 64)
    assert int(moments[prefix].tokens.sum()) == 6 * 64 * 2


def test_fisher_is_the_joint_moment(qwen3: Path) -> None:
    """sum (h dl/dh)^2 with dl/dh = w . g, against autograd on the experts' output."""
    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    blocks = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(2))
    moments = collect_moments(model, blocks)
    for (name, expert), pairs in expert_outputs(model, blocks).items():
        w = model.get_submodule(name).down_proj[expert].detach().double()
        joint = sum(((h.detach().double() * (out.grad.double() @ w)) ** 2).sum(0) for h, out in pairs)
        torch.testing.assert_close(moments[name].fisher[expert].double(), joint, rtol=1e-4, atol=1e-12)


def test_truncated_file_is_reported(calibration: Path, tmp_path: Path) -> None:
    data = (calibration / MOMENTS_FILE).read_bytes()
    (tmp_path / MOMENTS_FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(HeaprError, match="damaged"):
        NeuronMoments.from_pretrained(tmp_path)
