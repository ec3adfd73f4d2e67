# SPDX-License-Identifier: Apache-2.0
"""Codes of down_proj rounded again, so that their scales are constant along sums over neurons."""

from __future__ import annotations

import torch

from heapr_vllm.formats.quantized import BITWISE, LARGEST_CODE, dequantize

SCALE_DTYPE = torch.bfloat16  # of slabs


def round_by_slabs(codes: torch.Tensor, scale: torch.Tensor, slab: int) -> torch.Tensor:
    """Rounds 8-bit codes [width, H] with scales float32 [width, H / g] in place, to one scale per slab and output.

    A slab is `slab` neighbouring neurons, the last one cut short. Returns the scales, bf16 [ceil(width / slab), H]. The
    largest magnitude gets the largest code. A scale is rounded before codes are, which so make up for it.
    """
    largest = LARGEST_CODE["int" if codes.dtype == torch.int8 else "float"]
    slab_scales = []
    for part, part_scale in zip(codes.split(slab), scale.split(slab), strict=True):
        values = dequantize(part, part_scale, (1, part.shape[1] // part_scale.shape[1]))
        slab_scale = (values.abs().amax(0) / largest).to(SCALE_DTYPE)
        slab_scale = torch.where(slab_scale == 0, 1.0, slab_scale)
        values /= slab_scale.float()
        if codes.dtype == torch.int8:
            values.round_()
        part.view(BITWISE).copy_(values.clamp_(-largest, largest).to(codes.dtype).view(BITWISE))
        slab_scales.append(slab_scale)
    return torch.stack(slab_scales)
