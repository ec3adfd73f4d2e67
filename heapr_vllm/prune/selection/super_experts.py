# SPDX-License-Identifier: Apache-2.0
"""Super experts: the few whose removal wrecks a model, found by outlier output norms."""

import torch

from heapr_vllm.prune.calibration.moments import NeuronMoments

OUTLIER_FACTOR = 10.0
DEFAULT_PROTECTION = 0.5  # costs next to nothing: Qwen3-30B-A3B has 3 super experts among 6,144


def super_experts(moments: NeuronMoments) -> dict[str, torch.Tensor]:
    """bool [E] by prefix: the largest ||E(x)|| exceeds ten times its median over the layer and over the model.

    Removing 3 of 6,144 experts of Qwen3-30B-A3B, those whose extreme outputs make the massive activations, destroys the
    model (arXiv 2507.23279). Medians are not moved by such outliers. Both medians are asked: late layers have large
    outputs throughout, and in a layer of small outputs an outlier means little.
    Experts without a token have a norm of 0 and do not count. Raises HeaprError if the moments lack output norms.
    """
    moments.require(("peak_norm",), "--protect")
    overall = _median_of_routed(torch.cat(list(moments.peak_norm.values())))
    return {
        prefix: peaks > OUTLIER_FACTOR * torch.maximum(overall, _median_of_routed(peaks))
        for prefix, peaks in moments.peak_norm.items()
    }


def _median_of_routed(peaks: torch.Tensor) -> torch.Tensor:
    routed = peaks[peaks > 0]
    return routed.median() if len(routed) else torch.tensor(torch.inf, dtype=peaks.dtype)
