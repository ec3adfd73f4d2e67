# SPDX-License-Identifier: Apache-2.0
"""The MoE method of a pruned layer: owns the ragged weights, loads them, runs them through vLLM's modular kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.utils import set_weight_attrs

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.names import layer_index
from heapr_vllm.model_executor import cpu_routing
from heapr_vllm.model_executor.experts import HeaprExperts
from heapr_vllm.model_executor.kernels import op
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from heapr_vllm.model_executor.storage.shares import expert_parallel_ranks, tensor_parallel_shares

if TYPE_CHECKING:
    from heapr_vllm.model_executor.quantization import HeaprConfig

logger = init_logger(f"vllm.{__name__}")  # vLLM configures loggers below its own name only


class HeaprMoEMethod(FusedMoEMethodBase):
    """Method of the layer that vLLM calls `prefix`, pruned as `config` says.

    `keep`: bool [num_experts, moe_intermediate_size], all experts of the model's layer. `tokens`: how many tokens
    calibration routed to each of them, if the masks say so.
    """

    def __init__(self, moe: FusedMoEConfig, config: HeaprConfig, prefix: str) -> None:
        super().__init__(moe)
        self.prefix = prefix
        name = config.name_in_masks(prefix)
        self.keep = config.masks.keep[name]
        self.tokens = config.masks.tokens(name)
        self.weights_layout = config.pruning.layout
        self.router = cpu_routing.router()
        self.needs_weights = True
        self.loaded: set[tuple[int, str]] = set()

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        """Registers `w13_weight` [2 * rows, H] and `w2_weight` [rows, H]; `layout.py` says what the rows are.

        Raises HeaprError if the model's experts do not have the shape of the masks.
        """
        op.register_op()
        expected = (layer.global_num_experts, self.moe.intermediate_size)
        if tuple(self.keep.shape) != expected:
            raise HeaprError(
                f"masks do not belong to this model: {self.prefix} has (experts, neurons) {expected}, the "
                f"masks have {tuple(self.keep.shape)}; use the model they were made for"
            )
        if extra_weight_attrs.get("unpadded_hidden_size", hidden_size) != hidden_size:
            raise HeaprError(
                "this all-to-all backend pads the hidden size, which pruned experts do not support; "
                "choose another with --all2all-backend"
            )
        vllm_config = get_current_vllm_config()
        self.needs_weights = vllm_config.load_config.load_format != "dummy"
        self.max_tokens = (
            vllm_config.scheduler_config.max_num_batched_tokens * vllm_config.parallel_config.data_parallel_size
        )
        experts = self._local_experts(layer)
        self.local_ids = {expert: local for local, expert in enumerate(experts)}
        parallel = self.moe.moe_parallel_config
        kept = [int(self.keep[e].sum()) for e in experts]
        self.kernel = op.select_kernel(params_dtype, hidden_size)
        self.shares = tensor_parallel_shares(kept, parallel.tp_size, parallel.tp_rank, op.share_unit(self.kernel))
        widths = [stop - start for start, stop in self.shares]
        self.layout = RaggedLayout.build(
            widths,
            op.stored_widths(self.kernel, widths, self.moe.experts_per_token, hidden_size, params_dtype.itemsize),
        )
        attributes = {
            key: value
            for key, value in extra_weight_attrs.items()
            if key not in ("weight_loader", "unpadded_hidden_size", "global_num_experts")
        }
        for name, rows_per_neuron in (("w13_weight", 2), ("w2_weight", 1)):
            weight = nn.Parameter(
                torch.empty(rows_per_neuron * self.layout.num_rows, hidden_size, dtype=params_dtype),
                requires_grad=False,
            )
            layer.register_parameter(name, weight)
            set_weight_attrs(
                weight,
                {
                    **attributes,
                    "weight_loader": self.weight_loader,
                    "weight_loader_numel": rows_per_neuron * sum(widths) * hidden_size,
                },
            )

    def _local_experts(self, layer: RoutedExperts) -> list[int]:
        """Global ids of this rank's experts, by local id.

        Where every rank sees all tokens, any placement is right, and ours balances; what one layer leaves uneven falls
        on another rank in the next. Other all-to-all backends send tokens by the engine's placement, and
        `--enable-ep-weight-filter` reads the weights of that one only.
        """
        parallel = self.moe.moe_parallel_config
        sees_all_tokens = not parallel.use_all2all_kernels or parallel.all2all_backend == "allgather_reducescatter"
        if sees_all_tokens and not get_current_vllm_config().parallel_config.enable_ep_weight_filter:
            ranks = expert_parallel_ranks(self.keep.sum(-1).tolist(), self.tokens, parallel.ep_size)
            turn = layer_index(self.prefix)
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
        """Copies this rank's share of one expert tensor into `param`.

        `loaded_weight`: gate ("w1") or up ("w3") [width, H], or down ("w2") [H, width]; width is the kept width in the
        compact layout and moe_intermediate_size otherwise. Raises HeaprError if it is not.
        """
        local = self.local_ids.get(expert_id, -1)
        if local < 0:
            return False if return_success else None
        if not loaded_weight.is_floating_point() or loaded_weight.itemsize < 2:
            raise HeaprError(
                f"{weight_name} is quantized ({loaded_weight.dtype}); pruned experts need the unquantized base model"
            )
        rows = loaded_weight.T if shard_id == "w2" else loaded_weight
        kept = self.keep[expert_id].nonzero().flatten()
        width = len(kept) if self.weights_layout == "compact" else self.keep.shape[1]
        if rows.shape[0] != width:
            raise HeaprError(
                f"{weight_name} ({shard_id} of {self.prefix}.{expert_id}) has {rows.shape[0]} neurons "
                f"instead of {width}: weights and masks do not belong together; export again"
            )
        start, stop = self.shares[local]
        if start < stop:
            chosen = rows[start:stop] if self.weights_layout == "compact" else rows[kept[start:stop]]
            self._destination(param, local, shard_id).copy_(chosen)
        self.loaded.add((local, shard_id))
        return True if return_success else None

    def _destination(self, param: torch.Tensor, local: int, shard_id: str) -> torch.Tensor:
        """Rows of `param` that hold the real neurons of a local expert's gate, up or down."""
        row, stored = self.layout.place(local)
        first = {"w1": 2 * row, "w3": 2 * row + stored, "w2": row}[shard_id]
        return param.data[first : first + self.layout.widths[local]]

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Checks that every tensor came, zeroes the padding, packs in place, builds the kernel.

        Runs again after `reload_weights`, on parameters that were re-created uninitialised. Raises HeaprError if the
        checkpoint lacks an expert tensor.
        """
        wanted = {
            (local, shard) for local, width in enumerate(self.layout.widths) if width for shard in ("w1", "w2", "w3")
        }
        missing = sorted(wanted - self.loaded) if self.needs_weights else []
        self.needs_weights = True  # dummy weights are for the start only
        self.loaded.clear()
        if missing:
            local, shard = missing[0]
            expert = next(e for e, i in self.local_ids.items() if i == local)
            raise HeaprError(
                f"the checkpoint lacks {len(missing)} expert tensors, first {shard} of {self.prefix}."
                f"{expert}; export or download it again"
            )
        self._zero_padding(layer)
        op.pack(self.kernel, layer.w13_weight.data, layer.w2_weight.data, self.layout)
        self._register_tables(layer)
        op.warm_up(
            self.kernel,
            layer.w13_weight,
            layer.w2_weight,
            layer.heapr_slots,
            layer.heapr_table,
            self.moe.experts_per_token,
            self.layout.max_width,
            self.max_tokens,
        )
        if self.moe_kernel is None:
            self._build_kernel(layer)
            logger.info(
                "%s: %d of %d neurons, kernel %s, stored widths %s",
                self.prefix,
                sum(self.layout.widths),
                len(self.local_ids) * self.keep.shape[1],
                self.kernel,
                " ".join(f"{b.num_slots}x{b.width}" for b in self.layout.buckets),
            )

    def _zero_padding(self, layer: RoutedExperts) -> None:
        for local, width in enumerate(self.layout.widths):
            if self.layout.slots[local] < self.layout.num_slots:
                row, stored = self.layout.place(local)
                layer.w13_weight.data[2 * row : 2 * (row + stored)].view(2, stored, -1)[:, width:] = 0
                layer.w2_weight.data[row + width : row + stored] = 0

    def _register_tables(self, layer: RoutedExperts) -> None:
        """Index tables as non-persistent buffers: not checkpoint weights, and kept by sleep level 2 and reload."""
        slots = [self.layout.num_slots] * layer.global_num_experts
        for expert, local in self.local_ids.items():
            slots[expert] = self.layout.slots[local]
        device = layer.w13_weight.device
        slots, table = (tensor.to(device) for tensor in op.index_tables(self.kernel, slots, self.layout))
        layer.register_buffer("heapr_slots", slots, persistent=False)
        layer.register_buffer("heapr_table", table, persistent=False)

    def _build_kernel(self, layer: RoutedExperts) -> None:
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        prepare_finalize = maybe_make_prepare_finalize(
            moe=self.moe,
            quant_config=self.moe_quant_config,
            routing_tables=layer._expert_routing_tables(),
            allow_new_interface=True,
        )
        if prepare_finalize.activation_format != mk.FusedMoEActivationFormat.Standard:
            raise HeaprError(
                "pruned experts need an all-to-all backend with the standard activation format; choose "
                "another with --all2all-backend"
            )
        experts = HeaprExperts(self.moe, self.moe_quant_config, layer, self.layout, self.kernel)
        self.moe_kernel = mk.FusedMoEKernel(prepare_finalize, experts)

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
        return self.moe_kernel.apply(
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

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM leaves the routing to the method."""
        return self.router is not None

    def apply_monolithic(
        self, layer: RoutedExperts, x: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """As `apply`, from router logits [T, num_experts]; nothing is dispatched to other ranks."""
        topk_weights, topk_ids = self.router(layer, x, router_logits)
        if layer.apply_router_weight_on_input:
            x = x * topk_weights.to(x.dtype)
        output = torch.empty_like(x)
        self.moe_kernel.fused_experts.apply(
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


HeaprMoEMethod.weight_loader.supports_moe_loading = True  # vLLM's Llama-4 loader asks for it
