# SPDX-License-Identifier: Apache-2.0
"""Rounds a down_proj to codes neuron by neuron, each taking over what rounding those before it did to the output.

With W' [H, K] the refitted kept columns and S' = S_KK + lambda I from `least_squares.py`, codes Q are to minimise
tr((W' - Q) S' (W' - Q)^T), what the repair minimises but for a constant. Neurons are rounded in the order of falling
S'_jj, and the error of each, divided by U_jj, is taken from the ones to come in proportion to row j of U, the upper
Cholesky factor of the inverse of S': GPTQ (Frantar et al., 2023, arXiv 2210.17323, section 3.3). Scale groups lie
inside a neuron, so a neuron gets its scales when its turn comes and no order cuts a group.
"""

from __future__ import annotations

import torch

from heapr_vllm.formats.quantized import ExpertScheme, dequantize, quantize_rows

NEURONS_AT_ONCE = 64  # whose errors reach the neurons behind them in one product


def rounded_down(weight: torch.Tensor, moment: torch.Tensor, scheme: ExpertScheme) -> torch.Tensor:
    """Returns the float32 values [H, K] of the codes for `weight` [H, K]; `moment`: S' float64 [K, K].

    `scheme.quantize` finds the same codes in them again. `scheme` has scales in groups.
    """
    order = moment.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    wanted = weight.double().T[order]
    values = torch.empty(wanted.shape, dtype=torch.float32, device=weight.device)
    for first in range(0, len(wanted), NEURONS_AT_ONCE):
        last = min(first + NEURONS_AT_ONCE, len(wanted))
        errors = torch.empty_like(wanted[first:last])
        for neuron in range(first, last):
            values[neuron] = _nearest(wanted[neuron : neuron + 1], scheme)[0]
            error = (wanted[neuron] - values[neuron]) / factor[neuron, neuron]
            wanted[neuron + 1 : last].addr_(factor[neuron, neuron + 1 : last], error, alpha=-1)
            errors[neuron - first] = error
        wanted[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return values[order.argsort()].T


def _nearest(neurons: torch.Tensor, scheme: ExpertScheme) -> torch.Tensor:
    """Values of the nearest codes for `neurons` [n, H]."""
    assert scheme.group_size is not None
    codes, scale = quantize_rows(neurons, scheme.group_size, scheme.type, scheme.num_bits)
    return dequantize(codes, scale, (1, scheme.group_size))
