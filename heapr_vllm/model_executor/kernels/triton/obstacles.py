# SPDX-License-Identifier: Apache-2.0
"""Which layers the Triton kernels refuse, and why."""

from __future__ import annotations

import torch

from heapr_vllm.formats.quantized import GROUP_SIZE, MIN_GROUP_SIZE, ExpertScheme
from heapr_vllm.model_executor.kernels.triton.tiles import CODES_PER_WORD, SHORTEST_PLANE, plane_size

HAS_E4M3 = 89  # compute capability from which GPUs convert it, and their tensor cores multiply it


def layer_obstacle(
    dtype: torch.dtype,
    hidden_size: int,
    scheme: ExpertScheme | None,
    activation_bits: int | None = None,
    *,
    has_e4m3: bool = True,
) -> str | None:
    """Why the kernels run no such layer, wherever they are, with the remedy; None if they do.

    `scheme`: how experts are stored as the kernels get them; None in `dtype`. `activation_bits`: as of the kernel.
    `has_e4m3`: whether the GPU multiplies it.
    """
    if activation_bits:
        return _obstacle_to_rounding(dtype, hidden_size, scheme, has_e4m3)
    if hidden_size % 16:
        return f"the hidden size {hidden_size} is no multiple of 16; choose reference"
    if scheme is None or scheme.num_bits != 4 or plane_size(hidden_size, scheme.group_size or hidden_size):
        return None
    unit = CODES_PER_WORD * SHORTEST_PLANE
    return f"int4 experts on GPUs need a hidden size in multiples of {unit}, not {hidden_size}; use --quantize int8"


def _obstacle_to_rounding(
    dtype: torch.dtype, hidden_size: int, scheme: ExpertScheme | None, has_e4m3: bool
) -> str | None:
    """`layer_obstacle` for rounded activations."""
    if scheme is None or scheme.num_bits != 8:
        stored = scheme.name if scheme else "unquantized"
        return f"it is for experts in 8 bits, not {stored} ones; choose triton, or prune with --quantize int8"
    if dtype == torch.float32:
        return "it rounds activations to 8 bits, and the model computes in float32; choose triton"
    if (scheme.group_size or 0) > GROUP_SIZE:
        return f"it takes scales in groups of {GROUP_SIZE} at most, not of {scheme.group_size}; choose triton"
    if hidden_size % MIN_GROUP_SIZE:
        return f"the hidden size {hidden_size} is no multiple of {MIN_GROUP_SIZE}; choose triton"
    if scheme.type == "float" and not has_e4m3:
        return "this GPU does not multiply FP8; choose triton, or export with --quantize int8"
    return None


def gpu_has_e4m3() -> bool:
    """Whether the GPU at hand converts and multiplies E4M3; True without one, as Triton's interpreter does."""
    if not torch.cuda.is_available():
        return True
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor >= HAS_E4M3
