# SPDX-License-Identifier: Apache-2.0
"""The MoE method of a pruned layer: what vLLM calls to create, load and run its experts."""

from __future__ import annotations

from typing import Any, cast

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.base_quantization import BaseQuantization
from heapr_vllm.formats.names import layer_index
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor import compat
from heapr_vllm.model_executor.experts import HeaprExperts
from heapr_vllm.model_executor.kernels.base import ExpertRows, RaggedKernel
from heapr_vllm.model_executor.pruned_layer import PrunedLayer, as_pruned
from heapr_vllm.model_executor.storage.dense import DenseStorage
from heapr_vllm.model_executor.storage.layer_masks import LayerMasks
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from heapr_vllm.model_executor.storage.quantized import QuantizedStorage
from heapr_vllm.model_executor.storage.shares import expert_parallel_ranks, tensor_parallel_shares
from heapr_vllm.model_executor.traffic_recorder import TrafficRecorder

OWN_ATTRIBUTES = (
    "weight_loader",
    "unpadded_hidden_size",
    "global_num_experts",
)  # from vLLM, but the parameters get their own, or need none
logger = init_logger(f"vllm.{__name__}")  # vLLM configures loggers below its own name only


class HeaprMoEMethod(FusedMoEMethodBase):
    """Method of one pruned layer: owns the storage, answers vLLM.

    kernel: the `RaggedKernel` that runs the layer. storage: its experts on this rank, from `create_weights` on.
    experts: what calls the kernel, once weights are loaded.
    """

    storage: DenseStorage
    experts: HeaprExperts

    def __init__(
        self,
        moe: FusedMoEConfig,
        masks: LayerMasks,
        kernel: RaggedKernel,
        scheme: ExpertScheme | None,
        base: BaseQuantization | None,
        recorder: TrafficRecorder | None = None,
    ) -> None:
        """`scheme`: how experts come, None in the model's dtype; `base`: format of codes that masks slice.

        `recorder`: of the layer's traffic, if it is recorded.
        """
        super().__init__(moe)
        self.masks = masks
        self.kernel = kernel
        self.scheme = scheme if scheme is None or kernel.takes_two_widths else scheme.widened()
        self.widens = self.scheme != scheme
        self.base = base
        self.recorder = recorder
        self.router = compat.cpu_router()
        self.needs_weights = True

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        """Registers `w13_weight` and `w2_weight`, of the sizes that this rank's kept neurons need, and their scales.

        Raises HeaprError if the model's experts do not have the shape of the masks.
        """
        layer = as_pruned(layer)
        expected = (layer.global_num_experts, self.moe.intermediate_size)
        if tuple(self.masks.keep.shape) != expected:
            raise HeaprError(
                f"masks do not belong to this model: {self.masks.prefix} has (experts, neurons) {expected}, the "
                f"masks have {tuple(self.masks.keep.shape)}; use the model they were made for"
            )
        if extra_weight_attrs.get("unpadded_hidden_size", hidden_size) != hidden_size:
            raise HeaprError(
                "this all-to-all backend pads the hidden size, which pruned experts do not support; "
                "choose another with --all2all-backend"
            )
        config = get_current_vllm_config()
        self.needs_weights = config.load_config.load_format != "dummy"
        self.max_tokens = config.scheduler_config.max_num_batched_tokens * config.parallel_config.data_parallel_size
        self.dtype = params_dtype
        self.storage = self._plan_storage(layer)
        attributes = {key: value for key, value in extra_weight_attrs.items() if key not in OWN_ATTRIBUTES}
        self.storage.create(layer, hidden_size, params_dtype, self.weight_loader, attributes)

    def _plan_storage(self, layer: PrunedLayer) -> DenseStorage:
        experts = self._local_experts(layer)
        parallel = self.moe.moe_parallel_config
        kept = self.masks.keep[experts].sum(-1).tolist()
        shares = tensor_parallel_shares(kept, parallel.tp_size, parallel.tp_rank, self.kernel.share_unit)
        widths = [stop - start for start, stop in shares]
        stored = self.kernel.stored_widths(widths)
        local_ids = {expert: local for local, expert in enumerate(experts)}
        layout = RaggedLayout.build(widths, stored)
        if self.scheme is None:
            return DenseStorage(self.masks, local_ids, shares, layout)
        return QuantizedStorage(self.masks, local_ids, shares, layout, self.scheme, self.base, widens=self.widens)

    def _local_experts(self, layer: PrunedLayer) -> list[int]:
        """Global ids of this rank's experts, by local id.

        Where every rank sees all tokens, any placement is right, and ours balances; what one layer leaves uneven falls
        on another rank in the next. Other all-to-all backends send tokens by the engine's placement, and
        `--enable-ep-weight-filter` reads the weights of that one only.
        """
        parallel = self.moe.moe_parallel_config
        sees_all_tokens = not parallel.use_all2all_kernels or parallel.all2all_backend == "allgather_reducescatter"
        if sees_all_tokens and not get_current_vllm_config().parallel_config.enable_ep_weight_filter:
            ranks = expert_parallel_ranks(self.masks.keep.sum(-1).tolist(), self.masks.tokens, parallel.ep_size)
            turn = layer_index(self.masks.prefix)
            return [expert for expert, rank in enumerate(ranks) if (rank + turn) % parallel.ep_size == parallel.ep_rank]
        local_ids = [layer._map_global_expert_id_to_local_expert_id(e) for e in range(layer.global_num_experts)]
        return sorted((e for e, local in enumerate(local_ids) if local >= 0), key=local_ids.__getitem__)

    def weight_loader(
        self,
        param: nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Copies this rank's share of one expert tensor into `param`, as `DenseStorage.load` says."""
        is_here = self.storage.load(param, loaded_weight, weight_name, shard_id, expert_id)
        return is_here if return_success else None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Checks that every tensor came, zeroes the padding, packs in place, builds the kernel.

        Runs again after `reload_weights`, on parameters that were re-created uninitialised. Raises HeaprError if the
        checkpoint lacks an expert tensor.
        """
        layer = as_pruned(layer)
        if self.needs_weights:
            self.storage.check_complete()
        self.needs_weights = True  # dummy weights are for the start only
        self.storage.zero_padding(layer)
        w13, w2, scales = layer.w13_weight.data, layer.w2_weight.data, self.storage.scales(layer)
        self.kernel.pack(w13, w2, self.storage.layout, scales)
        self._register_tables(layer)
        self.storage.settle_scales(layer)
        if self.recorder:
            self.recorder.add(self.storage, self.moe.experts_per_token, w13.device)
        rows = ExpertRows(w13, w2, layer.heapr_table, self.storage.layout.max_width, scales=scales)
        self.kernel.warm_up(layer.heapr_slots, rows, self.moe.experts_per_token, self.max_tokens, self.dtype)
        if self.moe_kernel is None:
            self._build_kernel(layer)
            self._log()

    def _register_tables(self, layer: PrunedLayer) -> None:
        """Registers index tables as non-persistent buffers: no checkpoint weights, kept by sleep level 2 and reload."""
        slots = self.storage.slots(layer.global_num_experts)
        slots, table = self.kernel.index_tables(slots, self.storage.layout)
        device = layer.w13_weight.device
        layer.register_buffer("heapr_slots", slots.to(device), persistent=False)
        layer.register_buffer("heapr_table", table.to(device), persistent=False)

    def _log(self) -> None:
        layout = self.storage.layout
        logger.info(
            "%s: %d of %d neurons%s, kernel %s, stored widths %s",
            self.masks.prefix,
            sum(layout.widths),
            len(layout.widths) * self.masks.keep.shape[1],
            f" in {self.scheme.name}" if self.scheme else "",
            self.kernel.name,
            " ".join(f"{bucket.num_slots}x{bucket.width}" for bucket in layout.buckets),
        )

    def _build_kernel(self, layer: PrunedLayer) -> None:
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        prepare_finalize = maybe_make_prepare_finalize(
            moe=self.moe,
            quant_config=self.moe_quant_config,
            routing_tables=layer._expert_routing_tables(),
            allow_new_interface=True,
        )
        if prepare_finalize is None or prepare_finalize.activation_format != mk.FusedMoEActivationFormat.Standard:
            raise HeaprError(
                "pruned experts need an all-to-all backend with the standard activation format; choose "
                "another with --all2all-backend"
            )
        storage = self.storage
        self.experts = HeaprExperts(
            self.moe,
            self.moe_quant_config,
            layer,
            storage.layout,
            self.kernel,
            storage.scales,
            recorded=self.masks.name if self.recorder else "",
        )
        self.moe_kernel = mk.FusedMoEKernel(prepare_finalize, self.experts)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Routed experts' output [T, H] for `x` [T, H]; a partial sum under tensor parallelism, which vLLM reduces."""
        layer = as_pruned(layer)
        assert self.moe_kernel is not None
        output = self.moe_kernel.apply(
            hidden_states=x,
            w1=layer.w13_weight,
            w2=layer.w2_weight,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
        )
        return cast(torch.Tensor, output)  # the other type is that of experts which leave the sum to vLLM

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM leaves the routing to the method."""
        return self.router is not None

    def apply_monolithic(
        self, layer: RoutedExperts, x: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """As `apply`, from router logits [T, num_experts]; nothing is dispatched to other ranks."""
        layer = as_pruned(layer)
        assert self.router is not None
        topk_weights, topk_ids = self.router(layer, x, router_logits)
        if layer.apply_router_weight_on_input:
            x = x * topk_weights.to(x.dtype)
        output = torch.empty_like(x)
        self.experts.apply(
            output,
            x,
            layer.w13_weight,
            layer.w2_weight,
            topk_weights,
            topk_ids,
            layer.activation,
            layer.global_num_experts,
            layer.expert_map,
            None,
            None,
            output,
            output,
            None,
            layer.apply_router_weight_on_input,
        )
        return output


HeaprMoEMethod.weight_loader.supports_moe_loading = True  # ty: ignore[missing-attribute]  # vLLM's Llama-4 loader asks for it
