# SPDX-License-Identifier: Apache-2.0
"""Criteria against their formulas, computed from the model itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.tensorfile import save_tensors
from heapr_vllm.prune import NeuronMoments, collect_moments
from heapr_vllm.prune.calibration.moments import MOMENTS_FILE, NORMS, OUTPUTS, SUMS
from heapr_vllm.prune.selection.criteria import CRITERIA, score
from heapr_vllm.prune.selection.selector import select
from tests.prune.calibration.test_moments import expert_outputs


@pytest.fixture(scope="module")
def moments(calibration: Path) -> NeuronMoments:
    return NeuronMoments.from_pretrained(calibration)


def test_output_norms(qwen3: Path) -> None:
    """Sum of router weight x ||E(x)|| and largest ||E(x)||, the router weight from dl/dE and dl/d(weighted output)."""
    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    blocks = torch.randint(0, 256, (3, 64), generator=torch.Generator().manual_seed(2))
    moments = collect_moments(model, blocks, batch_size=2)
    weights: dict[str, list[torch.Tensor]] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: weights.setdefault(name, []).append(dense_weights(*args[1:], moments, name))
        )
        for name in moments.tokens
    ]
    for (name, expert), pairs in expert_outputs(model, blocks).items():
        norms = torch.cat([out.detach().norm(dim=-1) for _, out in pairs])
        weight = torch.cat(weights[name])[:, expert]
        weight = weight[weight > 0]
        torch.testing.assert_close(moments[name].peak_norm[expert].float(), norms.max(), rtol=1e-5, atol=0)
        torch.testing.assert_close(moments[name].routed_norm[expert].float(), norms @ weight, rtol=1e-5, atol=0)
    for hook in hooks:
        hook.remove()


def dense_weights(index: torch.Tensor, weights: torch.Tensor, moments: NeuronMoments, name: str) -> torch.Tensor:
    """Router weights [T, E], zero where a token does not go."""
    return torch.zeros(len(index), len(moments.tokens[name])).scatter_(1, index, weights.detach())


def test_weight_criteria(moments: NeuronMoments, qwen3: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    magnitude, energy = score(moments, "magnitude"), score(moments, "energy")
    for prefix in moments.tokens:
        experts = model.get_submodule(prefix)
        gate, up = experts.gate_up_proj.detach().double().chunk(2, 1)
        down = experts.down_proj.detach().double()
        torch.testing.assert_close(
            magnitude[prefix], gate.norm(dim=2) * up.norm(dim=2) * down.norm(dim=1), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(
            energy[prefix], moments[prefix].activation_sq.double() * (down**2).sum(1), rtol=1e-6, atol=0
        )


def test_sums_and_means(moments: NeuronMoments) -> None:
    """Twice the text in the same proportions doubles the sums and leaves the means alone."""
    sums = ("tokens", *SUMS, "routed_norm")
    doubled = {
        prefix: replace(layer, **{name: 2 * getattr(layer, name) for name in sums})
        for prefix, layer in moments.layers.items()
    }
    twice = replace(moments, layers=doubled)
    factors = {"heapr": 1, "reap": 1, "magnitude": 1, "random": 1, "fisher": 2, "heapr-frequency": 2, "energy": 2}
    assert factors.keys() == CRITERIA.keys()
    for name, factor in factors.items():
        once = score(moments, name)
        for prefix, scores in score(twice, name).items():
            torch.testing.assert_close(scores, factor * once[prefix])


def test_frequency_per_flop_is_the_papers_ranking(moments: NeuronMoments) -> None:
    for flops in (0.1, 0.3, 0.6):
        masks = select(moments, flops=flops, criterion="heapr-frequency", align=4)
        paper = select(moments, masks.sparsity, criterion="heapr", align=4)
        assert all(torch.equal(keep, paper.keep[prefix]) for prefix, keep in masks.keep.items())


def test_random_is_seeded(moments: NeuronMoments) -> None:
    one, other = (select(moments, 0.5, criterion="random", seed=seed) for seed in (0, 1))
    again = select(moments, 0.5, criterion="random", seed=0)
    assert all(torch.equal(one.keep[prefix], again.keep[prefix]) for prefix in one.keep)
    assert any(not torch.equal(one.keep[prefix], other.keep[prefix]) for prefix in one.keep)


def test_reap_removes_whole_experts(moments: NeuronMoments) -> None:
    masks = select(moments, 0.25, criterion="reap", scope="layer")
    for prefix, widths in masks.widths.items():
        assert sorted(widths.tolist()) == [0, 0, *[64] * 6]
        assert set((widths == 0).nonzero().flatten().tolist()) == set(
            (moments[prefix].routed_norm / moments[prefix].tokens).argsort()[:2].tolist()
        )


def test_moments_of_an_older_version(moments: NeuronMoments, tmp_path: Path) -> None:
    """They load, serve the criteria that need no norms, and say what to do for the others."""
    tensors = {}
    for prefix, layer in moments.layers.items():
        tensors |= {f"{prefix}.{name}": getattr(layer, name) for name in ("tokens", *SUMS)}
    save_tensors(tmp_path / MOMENTS_FILE, tensors, moments.metadata, version=1)
    old = NeuronMoments.from_pretrained(tmp_path)
    for name in ("heapr", "fisher", "heapr-frequency", "random"):
        assert all(torch.equal(scores, score(moments, name)[prefix]) for prefix, scores in score(old, name).items())
    assert select(old, 0.5).metadata["protected"] is None
    for name in ("energy", "magnitude", "reap"):
        with pytest.raises(HeaprError, match=f"criterion {name} needs .*_norm.* lack; calibrate again"):
            score(old, name)
    del tensors["model.layers.0.mlp.experts.fisher"]
    save_tensors(tmp_path / MOMENTS_FILE, tensors, moments.metadata, version=1)
    with pytest.raises(HeaprError, match="not a complete moments file"):
        NeuronMoments.from_pretrained(tmp_path)


def test_every_tensor_is_in_the_file(moments: NeuronMoments) -> None:
    for layer in moments.layers.values():
        assert layer.tensors().keys() == {"tokens", *SUMS, *NORMS, *OUTPUTS}
        assert all((values > 0).any() for values in layer.tensors().values())
