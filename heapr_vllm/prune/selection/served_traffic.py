# SPDX-License-Identifier: Apache-2.0
"""Moments of a calibration, weighed as the traffic of a server uses the experts."""

from __future__ import annotations

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.traffic import LayerTraffic, Traffic
from heapr_vllm.prune.calibration.moments import MAXIMA, LayerMoments, NeuronMoments


def as_served(moments: NeuronMoments, traffic: Traffic) -> NeuronMoments:
    """Makes the moments of a text whose experts are as busy as those of `traffic`, as long as the calibration text.

    Tokens per expert and sums of h^2 are those of the traffic. Sums with gradients, which a server has not, keep their
    mean per token of the expert and so count as often as the traffic takes it. Raises HeaprError as `check_same_model`.
    """
    check_same_model(moments, traffic)
    layers = {prefix: _as_served(layer, traffic.layers[prefix]) for prefix, layer in moments.layers.items()}
    record = {"tokens": traffic.tokens, "runs": traffic.runs}
    return NeuronMoments(layers, moments.metadata | {"traffic": record})


def check_same_model(moments: NeuronMoments, traffic: Traffic) -> None:
    """Raises HeaprError if traffic and calibration are of different models, or a layer had no traffic."""
    is_same = traffic.base_fingerprint == moments.metadata.get("base_fingerprint")
    shapes = {prefix: layer.activation_sq.shape for prefix, layer in traffic.layers.items()}
    if not is_same or shapes != {prefix: layer.activation_sq.shape for prefix, layer in moments.layers.items()}:
        raise HeaprError("the traffic is of another model than the calibration; record that of the calibrated one")
    for prefix, layer in traffic.layers.items():
        if not layer.tokens.any():
            raise HeaprError(f"the traffic has no token for {prefix}; serve the model for longer")


def _as_served(layer: LayerMoments, traffic: LayerTraffic) -> LayerMoments:
    scale = int(layer.tokens.sum()) / int(traffic.tokens.sum())
    tokens = (traffic.tokens * scale).round().long().clamp(min=(traffic.tokens > 0).long())
    tokens = tokens.where(layer.tokens > 0, 0)  # of experts that calibration never ran nothing is known, as before
    busier = tokens.double() / layer.tokens.clamp(min=1)
    weighed: dict[str, torch.Tensor] = {}
    for name, values in layer.tensors().items():
        factor = busier if values.ndim == 1 else busier[:, None]
        weighed[name] = values if name in MAXIMA else values.double() * factor
    energy = traffic.activation_sq.double() * scale
    return LayerMoments(**weighed | {"tokens": tokens, "activation_sq": energy})
