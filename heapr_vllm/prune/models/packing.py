# SPDX-License-Identifier: Apache-2.0
"""Whether samples that share a row of tokens can be kept apart in a model."""

from __future__ import annotations

from torch import nn

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune.models.module_weights import empty_model

MASKED = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers that take a mask


def check_packing(checkpoint: Checkpoint, dtype: str) -> None:
    """Raises HeaprError if layers carry more from token to token than attention does, which masks do not stop.

    Those are of another kind in the config, or have a convolution over tokens, as linear attention and Mamba have.
    """
    model = empty_model(checkpoint, dtype)
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if kinds - MASKED or any(isinstance(module, nn.Conv1d) for module in model.get_decoder().modules()):
        raise HeaprError(
            f"--packing cannot keep samples apart in {type(model).__name__}, which has other layers than attention; "
            "leave --packing out"
        )
