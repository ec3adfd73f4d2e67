# SPDX-License-Identifier: Apache-2.0
"""DeepSeekMoE from Transformers' blocks against the published equations, written out by hand."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.deepseek_config import DeepseekConfig
from heapr_vllm.prune import collect_moments
from heapr_vllm.prune.models.deepseek import DeepseekForCausalLM, register_deepseek_model

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register_deepseek_model()
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("deepseek") / "model"
    AutoModelForCausalLM.from_config(DeepseekConfig(**SIZES), dtype=torch.float32).save_pretrained(path)
    return path


def by_hand(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, vocab] from the equations of arXiv 2401.06066 (section 3) and rotary attention."""
    heads, width = SIZES["num_attention_heads"], SIZES["hidden_size"] // SIZES["num_attention_heads"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights[name]

    def ffn(x: torch.Tensor, prefix: str) -> torch.Tensor:
        gate, up, down = (weights[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def rotate(x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(SIZES["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        h = norm(x, f"{prefix}.input_layernorm.weight")
        q, k, v = ((h @ weights[f"{prefix}.self_attn.{name}_proj.weight"].T).view(-1, heads, width) for name in "qkv")
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / width**0.5
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ weights[f"{prefix}.self_attn.o_proj.weight"].T
        h = norm(x, f"{prefix}.post_attention_layernorm.weight")
        if layer < SIZES["first_k_dense_replace"]:
            x = x + ffn(h, f"{prefix}.mlp")
            continue
        probabilities = (h @ weights[f"{prefix}.mlp.gate.weight"].T).softmax(-1)
        kept, experts = probabilities.topk(SIZES["num_experts_per_tok"])
        routed = torch.stack(
            [
                sum(p * ffn(token, f"{prefix}.mlp.experts.{e}") for p, e in zip(ps, es, strict=True))
                for token, ps, es in zip(h, kept, experts.tolist(), strict=True)
            ]
        )
        x = x + routed + ffn(h, f"{prefix}.mlp.shared_experts")
    return norm(x, "model.norm.weight") @ weights["lm_head.weight"].T


def test_logits_equal_the_equations(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert isinstance(model, DeepseekForCausalLM)
    ids = torch.randint(0, 50, (20,), generator=torch.Generator().manual_seed(1))
    checkpoint = Checkpoint(saved)
    weights = {}
    for shard, names in checkpoint.shards.items():
        with checkpoint.open(shard) as file:
            weights |= {name: file.get_tensor(name) for name in names}
    assert all(0.2 < tensor.std() < 0.4 for name, tensor in weights.items() if "norm" not in name), "initialised"
    with torch.no_grad():
        torch.testing.assert_close(model(ids[None]).logits[0], by_hand(weights, ids), rtol=1e-4, atol=1e-4)


def test_published_layout(saved: Path) -> None:
    assert Checkpoint(saved).expert_shapes() == {f"model.layers.{layer}.mlp.experts": (6, 12) for layer in (1, 2)}
    assert AutoConfig.from_pretrained(saved).n_routed_experts == 6


def test_moments_are_collected_or_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32), torch.arange(40)[None]
    assert all(tokens.sum() == 40 * 3 for tokens in collect_moments(model, ids).tokens.values())
    monkeypatch.setattr(DeepseekForCausalLM, "set_experts_implementation", lambda self, name: None)
    with pytest.raises(HeaprError, match="no token reached model.layers.1.mlp.experts"):
        collect_moments(model, ids)


def test_other_routing_is_refused() -> None:
    with pytest.raises(HeaprError, match="norm_topk_prob"):
        DeepseekForCausalLM(DeepseekConfig(**SIZES, norm_topk_prob=True))
