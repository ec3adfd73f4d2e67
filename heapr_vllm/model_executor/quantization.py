# SPDX-License-Identifier: Apache-2.0
"""`quantization_config.quant_method = "heapr"`: finds the masks and gives every MoE layer its method."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.base_quantization import BaseQuantization
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import MASKS_FILE, QUANT_METHOD, PruningConfig
from heapr_vllm.formats.folder import inside
from heapr_vllm.formats.masks import NeuronMasks, check_masks_sha256, file_sha256, find_masks
from heapr_vllm.formats.names import is_draft_layer, layer_index
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor.base_model import BASE_MODEL_KEY, base_checkpoint, check_base
from heapr_vllm.model_executor.inner_quantization import InnerQuantization
from heapr_vllm.model_executor.kernels.choice import forced_kernel
from heapr_vllm.model_executor.storage.layer_masks import LayerMasks

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    from heapr_vllm.model_executor.kernels.base import RaggedKernel
    from heapr_vllm.model_executor.traffic_recorder import TrafficRecorder

OWN_TO_A_PROCESS = ("masks", "masks_path", "bases", "inner", "recorder")  # made anew by every worker


class HeaprConfig(QuantizationConfig):
    """Travels by pickle to every worker, so it carries names only; each process reads the masks itself."""

    def __init__(self, pruning: PruningConfig | None = None) -> None:
        super().__init__()
        self.pruning = pruning or PruningConfig()
        self.model_name = ""
        self.revision: str | None = None
        self.num_layers: int | None = None
        self.hidden_size: int | None = None
        self.bases: dict[str | None, Checkpoint] = {}
        self.inner = InnerQuantization()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in OWN_TO_A_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.bases = {}
        self.inner = InnerQuantization()

    @classmethod
    def get_name(cls) -> str:  # ty: ignore[incompatible-method-override]  # vLLM lists the names it ships
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HeaprConfig:
        """Raises HeaprError if the block is of a newer format or asks for something unsupported."""
        return cls(PruningConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """vLLM calls it right after `from_config` with what that lacks: the model's name.

        Raises HeaprError, before any worker starts, if the masks are missing, damaged or belong to another model, or a
        kernel is forced that cannot run here.
        """
        self.model_name, self.revision = model_name, revision
        text_config = getattr(hf_config, "text_config", None) or hf_config
        self.num_layers = getattr(text_config, "num_hidden_layers", None)
        self.hidden_size = getattr(text_config, "hidden_size", None)
        forced_kernel()
        for prefix in self.masks.keep:
            if self.num_layers is not None and layer_index(prefix) >= self.num_layers:
                raise HeaprError(
                    f"masks do not belong to {model_name}: they cover {prefix}, the model has "
                    f"{self.num_layers} layers; use the model they were made for"
                )
        if isinstance(getattr(hf_config, "quantization_config", None), dict):
            # vLLM's cache of compiled graphs is keyed by the config: make it depend on the widths, not on a path
            hf_config.quantization_config["masks_sha256"] = file_sha256(self.masks_path)
        if Path(model_name).is_dir() or self.pruning.layout == "masks":
            weights = Checkpoint.resolve(model_name, revision)
            if weights.has_weights:
                weights.check_readable()
                if self.pruning.layout == "masks":
                    check_base(weights, self.masks, self.pruning)
        self._lift_scale_format(hf_config)

    def _lift_scale_format(self, hf_config: Any) -> None:
        """Puts `scale_fmt` of the base model's block where vLLM looks for it: beside `quant_method`."""
        scale_format = (self.inner_block or {}).get("scale_fmt")
        if scale_format and isinstance(getattr(hf_config, "quantization_config", None), dict):
            hf_config.quantization_config["scale_fmt"] = scale_format

    @property
    def base(self) -> Checkpoint | None:
        """The model whose weights masks slice; None for compact checkpoints, and if nobody has it here.

        While a model is built it is known where the user says that it is. Dummy weights need none.
        """
        if self.pruning.layout == "compact":
            return None
        config = get_current_vllm_config_or_none()
        load_config = config.load_config if config else None
        override = load_config.model_loader_extra_config.get(BASE_MODEL_KEY) if load_config else None
        if override not in self.bases:
            try:
                self.bases[override] = base_checkpoint(self.model_name, self.revision, self.pruning, override)
            except HeaprError:
                if load_config is not None and load_config.load_format != "dummy":
                    raise
                return None
        return self.bases[override]

    @property
    def inner_block(self) -> dict[str, Any] | None:
        """`quantization_config` of the weights that are not pruned experts."""
        return self.pruning.inner if self.base is None else self.base.quantization

    def storage_formats(self) -> tuple[ExpertScheme | None, BaseQuantization | None]:
        """Returns how experts are stored in memory, and the format of the codes that masks slice, if they do.

        Raises HeaprError if the base model's experts are codes and other ones are asked for, or only some are codes.
        """
        wanted = self.pruning.expert_scheme
        base = self._base_codes()
        if base is None:
            return wanted, None
        assert self.hidden_size is not None
        kept = base.scheme(self.hidden_size)
        if wanted not in (None, kept):
            raise HeaprError(
                f"experts of {self.model_name} cannot be stored as {wanted.name} by {wanted.strategy} while loading: "
                f"the base model has {kept.name} codes by {kept.strategy}, which are served as they are; write a "
                f"checkpoint with `heapr export --quantize {wanted.name}`, or prune without --quantize"
            )
        return kept, base

    def _base_codes(self) -> BaseQuantization | None:
        """Format of the base model's experts; None if they are in the model's dtype, as its attention need not be."""
        if self.pruning.layout == "compact":
            return None
        if self.base is not None:
            return self.base.kept_quantization
        block = self.pruning.inner
        return BaseQuantization.from_config(block, self.model_name) if block else None

    @cached_property
    def masks_path(self) -> Path:
        """The masks file: inside the model by default, else where the user says on the command line.

        Raises HeaprError if it is missing, or if the model's own config.json names a place outside of the model.
        """
        own, name = Checkpoint.described(self.model_name, self.revision), self.pruning.masks
        is_named_by_model = own.pruning is not None and own.pruning.masks == name
        is_there = not Path(name).is_absolute() and (own.path / name).is_file()
        if is_named_by_model or is_there or name == MASKS_FILE:
            inside(own.path, name)
            return find_masks(self.model_name, self.revision, name)
        return find_masks(name)

    @cached_property
    def masks(self) -> NeuronMasks:
        """Raises HeaprError if they cannot be found or differ from `masks_sha256`."""
        check_masks_sha256(self.masks_path, self.pruning.masks_sha256)
        return NeuronMasks.load(self.masks_path)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The ragged method for a pruned MoE layer, the base model's for everything else.

        Raises HeaprError for what neither can run.
        """
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from heapr_vllm.model_executor.unsupported import (
            refuse_float32,
            refuse_other_loaders,
            refuse_unsupported,
        )

        if not isinstance(layer, RoutedExperts) or self.is_draft_layer(prefix):
            block = self.inner_block
            if (base := self.base) is None:
                self.inner.build(block, self.model_name, self.revision)
            else:
                self.inner.build(block, str(base.path), None)
            method = self.inner.method(layer, prefix, self.packed_modules_mapping)
            if not isinstance(layer, LinearBase):
                return method
            if block is None or method is None:
                return UnquantizedLinearMethod()
            if not isinstance(method, UnquantizedLinearMethod):
                refuse_float32(block, prefix)
            return method
        from heapr_vllm.model_executor.moe_method import HeaprMoEMethod
        from heapr_vllm.model_executor.pruned_layer import as_pruned

        pruned = as_pruned(layer)
        refuse_unsupported(pruned, self)
        scheme, base = self.storage_formats()
        refuse_other_loaders(base)
        masks = self.layer_masks(prefix)
        recorder = self.recorder
        kernel = self.kernel(pruned.moe_config, masks.keep.shape, scheme, adds_up_traffic=recorder is not None)
        _note_for_graphs(kernel, scheme, self.inner_block, recorder is not None)
        return HeaprMoEMethod(pruned.moe_config, masks, kernel, scheme, base, recorder)

    @cached_property
    def recorder(self) -> TrafficRecorder | None:
        """Records the traffic of this process; None if nobody asked for it. Raises HeaprError if it cannot."""
        from heapr_vllm.model_executor.traffic_recorder import start_recorder

        return start_recorder(self.model_name, self.masks, self.pruning.base_model.fingerprint)

    def kernel(
        self, moe: FusedMoEConfig, shape: torch.Size, scheme: ExpertScheme | None, *, adds_up_traffic: bool = False
    ) -> RaggedKernel:
        """Returns what runs the layers of `shape` (num_experts, moe_intermediate_size), all of them alike.

        Raises HeaprError if nothing can.
        """
        from heapr_vllm.model_executor.kernels.choice import candidates
        from heapr_vllm.model_executor.kernels.op import register_op
        from heapr_vllm.model_executor.tuning.kernel_timing import TimedLayer
        from heapr_vllm.model_executor.tuning.timed_choice import choose_kernel

        register_op()
        kept: list[int] = []
        for keep in self.masks.keep.values():
            kept += keep.sum(-1).tolist() if keep.shape == shape else []
        parts = moe.moe_parallel_config.tp_size
        widths = [-(-width // parts) for width in kept]
        layer = TimedLayer.of(
            widths,
            shape[0],
            moe.experts_per_token,
            moe.hidden_dim,
            moe.in_dtype,
            num_local_experts=moe.num_local_experts,
        )
        able = candidates(moe.in_dtype, moe.hidden_dim, scheme, adds_up_traffic=adds_up_traffic)
        return choose_kernel(able, layer)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Hands on how vLLM renames modules, which the base model's block names."""
        self.inner.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_cache_scale_mapper(self) -> Any:  # vLLM calls it on the instance
        return (self.inner.config or super()).get_cache_scale_mapper()

    @property
    def weight_block_size(self) -> list[int] | None:
        """vLLM asks whether a config has it, and switches its own quantization of activations by the answer."""
        block = self.inner_block or {}
        if "weight_block_size" not in block:
            raise AttributeError("weight_block_size")
        return block["weight_block_size"]

    def layer_masks(self, prefix: str) -> LayerMasks:
        """Returns the masks of the layer that vLLM calls `prefix`. Raises HeaprError if there are none."""
        name = self.name_in_masks(prefix)
        is_compact = self.pruning.layout == "compact"
        return LayerMasks(prefix, self.masks.keep[name], self.masks.tokens(name), is_compact, name)

    def name_in_masks(self, prefix: str) -> str:
        """What the masks call the layer that vLLM calls `prefix`.

        vLLM renames modules of some families (language_model.model.layers.3 for model.language_model.layers.3), so a
        prefix that is not in the masks is found by its layer index. Raises HeaprError if the masks lack the layer.
        """
        if prefix in self.masks.keep:
            return prefix
        found = [name for name in self.masks.keep if layer_index(name) == layer_index(prefix)]
        if len(found) != 1:
            raise HeaprError(
                f"masks do not belong to {self.model_name}: they lack {prefix}; use the model they were made for"
            )
        return found[0]

    def is_draft_layer(self, prefix: str) -> bool:
        """Whether `prefix` belongs to a multi-token-prediction module, whose experts are never pruned."""
        return is_draft_layer(prefix, self.num_layers)


def _note_for_graphs(
    kernel: RaggedKernel, scheme: ExpertScheme | None, inner: dict[str, Any] | None, adds_up_traffic: bool
) -> None:
    """Puts into the config, by which vLLM's cache of compiled graphs is keyed, what graphs hold beside the widths.

    The kernel's name is a constant of theirs, how weights are stored comes from the base model, and where traffic is
    added up layers have names.
    """
    config = get_current_vllm_config_or_none()
    block = getattr(config.model_config.hf_config, "quantization_config", None) if config else None
    if isinstance(block, dict):
        block["stored"] = [kernel.name, scheme.to_dict() if scheme else None, inner, adds_up_traffic]
