# SPDX-License-Identifier: Apache-2.0
"""Offline pruning: text in, retained-neuron masks out, optionally a compact checkpoint. Never imports vLLM.

    moments = collect_moments(model, blocks)        # one forward and one backward pass
    masks = select(moments, sparsity=0.25)          # milliseconds, any budget
    with masks.applied(model): ...                  # the pruned model in transformers
"""

from heapr_vllm.masks import NeuronMasks
from heapr_vllm.prune.calibrate import CalibrationSettings, calibrate, collect_moments
from heapr_vllm.prune.evaluate import perplexity
from heapr_vllm.prune.export import export_checkpoint, write_masks_repository
from heapr_vllm.prune.moments import NeuronMoments
from heapr_vllm.prune.select import Selector, select, select_by_saliency
from heapr_vllm.prune.sweep import sweep

__all__ = ["CalibrationSettings", "NeuronMasks", "NeuronMoments", "Selector", "calibrate", "collect_moments",
           "export_checkpoint", "perplexity", "select", "select_by_saliency", "sweep", "write_masks_repository"]
