# SPDX-License-Identifier: Apache-2.0
"""Super experts: the few whose removal wrecks a model, found by outlier output norms."""

import torch

from heapr_vllm.prune.calibration.moments import NeuronMoments

OUTLIER_FACTOR = 10.0
DEFAULT_PROTECTION = 0.5  # costs next to nothing: Qwen3-30B-A3B has 3 super experts among 6,144


def super_experts(moments: NeuronMoments) -> dict[str, torch.Tensor]:
    """Finds experts whose largest ||E(x)|| exceeds ten times its median over the layer and over the model.

    Returns prefix -> bool [E].

    Removing 3 of 6,144 experts of Qwen3-30B-A3B, those whose extreme outputs make the massive activations, destroys the
    model (arXiv 2507.23279). Medians are not moved by such outliers. Both medians are asked: late layers have large
    outputs throughout, and in a layer of small outputs an outlier means little.
    Experts without a token have a norm of 0 and do not count. Raises HeaprError if the moments lack output norms.
    """
    peaks = {prefix: layer.required(("peak_norm",), "--protect")[0] for prefix, layer in moments.layers.items()}
    overall = _median_of_routed(torch.cat(list(peaks.values())))
    found: dict[str, torch.Tensor] = {}
    for prefix, norms in peaks.items():
        typical = torch.maximum(overall, _median_of_routed(norms))
        found[prefix] = norms > OUTLIER_FACTOR * typical
    return found


def _median_of_routed(peaks: torch.Tensor) -> torch.Tensor:
    routed = peaks[peaks > 0]
    return routed.median() if len(routed) else torch.tensor(torch.inf, dtype=peaks.dtype)
