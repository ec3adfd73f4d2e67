# SPDX-License-Identifier: Apache-2.0
"""Which experts a rank holds: ours where every rank sees all tokens, the engine's where tokens go by its placement.

Ours changes sides from layer to layer.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from heapr_vllm.model_executor import moe_method
from heapr_vllm.model_executor.kernels.reference import ReferenceKernel
from heapr_vllm.model_executor.storage.layer_masks import LayerMasks

WIDTHS = (8, 1, 1, 6)
ENGINE = ([0, 1], [2, 3])  # experts by rank
BALANCED = ([0], [1, 2, 3])
TOKENS = [1, 60, 60, 1]
BALANCED_WORK = ([0, 2], [1, 3])


@pytest.mark.parametrize(
    ("uses_all2all", "backend", "reads_own_weights_only", "tokens", "expected"),
    [
        (False, "allgather_reducescatter", False, TOKENS, BALANCED_WORK),  # expert parallel over tensor-parallel ranks
        (False, "allgather_reducescatter", False, None, BALANCED),  # masks that do not say how often experts run
        (True, "allgather_reducescatter", False, TOKENS, BALANCED_WORK),  # data parallel
        (True, "deepep_high_throughput", False, TOKENS, ENGINE),
        (False, "allgather_reducescatter", True, TOKENS, ENGINE),
    ],
)
def test_placement(
    uses_all2all: bool,
    backend: str,
    reads_own_weights_only: bool,
    tokens: list[int] | None,
    expected: tuple[list[int], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        moe_method,
        "get_current_vllm_config",
        lambda: SimpleNamespace(parallel_config=SimpleNamespace(enable_ep_weight_filter=reads_own_weights_only)),
    )
    keep = torch.arange(8) < torch.tensor(WIDTHS)[:, None]
    first, second = (LayerMasks(f"model.layers.{i}.mlp.experts", keep, tokens, is_compact=False) for i in range(2))
    for rank, experts in enumerate(expected):
        moe = SimpleNamespace(
            moe_parallel_config=SimpleNamespace(
                use_all2all_kernels=uses_all2all, all2all_backend=backend, ep_size=2, ep_rank=rank
            )
        )
        local = {expert: index for index, expert in enumerate(ENGINE[rank])}
        layer = SimpleNamespace(
            global_num_experts=len(WIDTHS),
            _map_global_expert_id_to_local_expert_id=lambda e, local=local: local.get(e, -1),
        )
        assert moe_method.HeaprMoEMethod(moe, first, ReferenceKernel(), None, None)._local_experts(layer) == experts
        next_layer = experts if expected is ENGINE else expected[1 - rank]
        assert moe_method.HeaprMoEMethod(moe, second, ReferenceKernel(), None, None)._local_experts(layer) == next_layer
