# SPDX-License-Identifier: Apache-2.0
"""The collector's grouped products: what a GPU would launch, counted on the meta device, and that its path is right."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from heapr_vllm.prune import NeuronMoments, collect_moments
from heapr_vllm.prune.calibration import collector, grouped_product
from heapr_vllm.prune.calibration.collector import MomentCollector
from heapr_vllm.prune.calibration.moments import NORMS, OUTPUTS, SUMS
from heapr_vllm.prune.calibration.sorted_routes import SortedRoutes
from tests import tiny_models


class Launches(TorchDispatchMode):
    """Counts the operators that are not views, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    """Takes torch's grouped product everywhere; torch has it on CPUs too."""
    monkeypatch.setattr(
        collector, "grouped_product", lambda rows, weights, ends: F.grouped_mm(rows, weights, offs=ends)
    )


@pytest.fixture
def model(qwen3: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)


def random_blocks(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 48), generator=torch.Generator().manual_seed(3))


def assert_same(a: NeuronMoments, b: NeuronMoments, rtol: float) -> None:
    for prefix in a.tokens:
        assert torch.equal(a.tokens[prefix], b.tokens[prefix])
        for name in (*SUMS, *OUTPUTS, *NORMS):
            torch.testing.assert_close(getattr(a[prefix], name), getattr(b[prefix], name), rtol=rtol, atol=0)


def layer_launches(experts: int) -> Counter[str]:
    """Counts what one layer's experts launch forward and back; on the meta device a value asked for is an error."""
    config = Qwen3MoeConfig(
        **tiny_models.COMMON | {"num_experts": experts, "num_experts_per_tok": 4, "num_hidden_layers": 1}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
        states = torch.empty(32, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        index = torch.empty(32, 4, dtype=torch.int64)
        weights = torch.empty(32, 4, requires_grad=True)
    moments = MomentCollector(model)
    (module,) = moments.prefixes
    with Launches() as launches:
        output = moments.forward(module, states, index, weights)
        output.backward(torch.empty_like(output))
    assert states.grad is not None and weights.grad is not None
    return launches.counts


def test_launches_do_not_depend_on_the_number_of_experts(as_on_a_gpu) -> None:
    few, more, many = layer_launches(8), layer_launches(32), layer_launches(128)
    assert few == more == many
    assert few["_grouped_mm"] == 4, "forward and backward, twice"
    assert few.total() < 80


def test_grouped_product_of_torch_collects_the_same(model: PreTrainedModel, request: pytest.FixtureRequest) -> None:
    wanted = collect_moments(model, random_blocks(3), 2)
    request.getfixturevalue("as_on_a_gpu")
    assert_same(collect_moments(model, random_blocks(3), 2), wanted, rtol=1e-5)


def test_rows_in_parts_collect_the_same(model: PreTrainedModel, monkeypatch) -> None:
    wanted = collect_moments(model, random_blocks(3))
    monkeypatch.setattr(collector, "ROWS_AT_ONCE", 10)
    assert_same(collect_moments(model, random_blocks(3)), wanted, rtol=1e-5)


def test_checkpointing_repeats_no_product_but_the_first(model: PreTrainedModel, monkeypatch) -> None:
    """Gate and up forward, again, and back; down forward and back."""
    products = []
    monkeypatch.setattr(
        collector,
        "grouped_product",
        lambda *args: products.append(args) or grouped_product.grouped_product(*args),
    )
    collect_moments(model, random_blocks(1))
    assert len(products) == 5 * tiny_models.COMMON["num_hidden_layers"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[0, 3, 64, 0, 65, 1, 0], [7], [0, 0, 130], [64, 64], [0, 0]])
def test_product_by_expert(counts: list[int], dtype: torch.dtype) -> None:
    rows, weights = torch.randn(sum(counts), 24).to(dtype), torch.randn(len(counts), 40, 24).to(dtype)
    ends = torch.tensor(counts).cumsum(0).int()
    wanted = torch.cat([part @ weight.T for part, weight in zip(rows.split(counts), weights, strict=True)])
    for layout in (weights.mT, weights.mT.contiguous()):
        torch.testing.assert_close(grouped_product.grouped_product(rows, layout, ends), wanted)


def test_grouped_mm_needs_aligned_rows() -> None:
    for hidden, width, aligned in ((64, 32, True), (64, 33, False), (63, 32, False)):
        rows, weights = torch.empty(5, hidden, dtype=torch.bfloat16), torch.empty(2, hidden, width)
        assert grouped_product.takes_grouped_mm(rows, weights) == aligned


def test_sorted_routes() -> None:
    index = torch.tensor([[4, 1], [1, 2], [4, 2], [1, 4]])  # of 6 experts; 0, 3 and 5 get nothing
    routes = SortedRoutes.sort(index, 6)
    assert routes.counts.tolist() == [0, 3, 2, 0, 3, 0] and routes.ends.tolist() == [0, 3, 5, 5, 8, 8]
    tokens, weights = torch.randn(4, 5), torch.randn(4, 2)
    rows = routes.rows(tokens)
    assert torch.equal(rows, tokens[[0, 1, 3, 1, 2, 0, 2, 3]])
    assert torch.equal(routes.by_route(routes.by_row(weights)), weights)
    torch.testing.assert_close(routes.sum_by_token(rows), 2 * tokens)
    torch.testing.assert_close(routes.sum_by_token(rows, weights), tokens * weights.sum(1, keepdim=True))
    sums, peaks = routes.by_expert(rows, "sum"), routes.by_expert(rows.abs(), "max")
    for expert in range(6):
        mine = tokens[(index == expert).any(1)]
        torch.testing.assert_close(sums[expert], mine.sum(0))
        assert torch.equal(peaks[expert], mine.abs().amax(0) if len(mine) else torch.zeros(5))
