# SPDX-License-Identifier: Apache-2.0
"""Second moments against explicit expert activations."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from heapr_vllm.prune.repair.second_moments import collect_second_moments


@pytest.fixture
def model(tiny: Path):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


BLOCKS = torch.randint(0, 256, (5, 40), generator=torch.Generator().manual_seed(4))


def test_equals_explicit_sums(model) -> None:
    inputs = {}
    name = "model.layers.1.mlp.experts"
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.update(args=args))
    model(BLOCKS)
    hook.remove()
    found = collect_second_moments(model, BLOCKS, batch_size=2)
    assert list(found) == [f"model.layers.{layer}.mlp.experts" for layer in range(3)]
    hidden, index, weights = inputs["args"]
    for expert, moment in found[name].items():
        token, rank = torch.where(index == expert)
        gate, up = F.linear(hidden[token], model.get_submodule(name).gate_up_proj[expert]).chunk(2, -1)
        ph = (F.silu(gate) * up * weights[token, rank, None]).double()
        assert moment.tokens == len(token)
        torch.testing.assert_close(moment.sums, ph.T @ ph, rtol=0, atol=1e-5 * float(moment.sums.abs().max()))


def test_only_the_wanted_experts_and_no_later_layer(model) -> None:
    everything = collect_second_moments(model, BLOCKS)
    ran = []
    model.model.layers[2].register_forward_hook(lambda *_: ran.append(2))
    done: list[int] = []
    wanted = {"model.layers.0.mlp.experts": [3, 5], "model.layers.1.mlp.experts": [0]}
    found = collect_second_moments(model, BLOCKS, experts=wanted, after_batch=lambda batch: done.append(batch.samples))
    assert {prefix: list(experts) for prefix, experts in found.items()} == wanted and done == [1] * 5
    assert all(
        torch.equal(moment.sums, everything[prefix][expert].sums)
        for prefix, experts in found.items()
        for expert, moment in experts.items()
    )
    assert not ran, "the forward pass ends with the last wanted layer"
    model(BLOCKS[:1])
    assert ran, "and the model is left as it was"
