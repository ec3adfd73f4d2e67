# SPDX-License-Identifier: Apache-2.0
"""What codes of down_proj are worth once a kernel has rounded them again by slabs."""

import torch

from heapr_vllm.formats.quantized import LARGEST_CODE


def rounded_slabs(w2: torch.Tensor, kind: str, slab: int) -> torch.Tensor:
    """Values [width, H] once rounded to codes with bf16 scales, one per `slab` rows and column."""
    parts = []
    for part in w2.split(slab):
        scale = (part.abs().amax(0, keepdim=True) / LARGEST_CODE[kind]).bfloat16().float()
        steps = (part / scale.where(scale > 0, 1.0)).clamp(-LARGEST_CODE[kind], LARGEST_CODE[kind])
        codes = steps.round() if kind == "int" else steps.to(torch.float8_e4m3fn).float()
        parts.append(codes * scale)
    return torch.cat(parts)
