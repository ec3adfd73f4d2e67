# SPDX-License-Identifier: Apache-2.0
"""Offline pruning: text in, retained-neuron masks out, optionally a compact checkpoint. Never imports vLLM.

moments = collect_moments(model, samples)       # one forward and one backward pass
masks = select(moments, sparsity=0.25)          # milliseconds, any budget
with applied(masks, model): ...                 # the pruned model in transformers
"""

from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.prune.calibration.calibrate import calibrate
from heapr_vllm.prune.calibration.in_memory import collect_moments
from heapr_vllm.prune.calibration.moments import LayerMoments, NeuronMoments
from heapr_vllm.prune.calibration.settings import CalibrationSettings
from heapr_vllm.prune.export.checkpoint import export_checkpoint
from heapr_vllm.prune.export.masks_repository import write_masks_repository
from heapr_vllm.prune.models.pruned import applied
from heapr_vllm.prune.selection.selector import Selector, select, select_by_saliency
from heapr_vllm.prune.selection.sweep import sweep

__all__ = [
    "CalibrationSettings",
    "LayerMoments",
    "NeuronMasks",
    "NeuronMoments",
    "Selector",
    "applied",
    "calibrate",
    "collect_moments",
    "export_checkpoint",
    "select",
    "select_by_saliency",
    "sweep",
    "write_masks_repository",
]
