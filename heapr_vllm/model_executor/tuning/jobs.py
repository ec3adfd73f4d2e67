# SPDX-License-Identifier: Apache-2.0
"""What to tune: the layers of a pruned model, or synthetic layers of the paper's models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.names import natural_order
from heapr_vllm.formats.pruned import read_masks
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.formats.served_scheme import served_scheme
from heapr_vllm.model_executor.kernels.triton.obstacles import gpu_has_e4m3, layer_obstacle
from heapr_vllm.model_executor.kernels.triton.tiles import TRITON_UNIT, LayerShape
from heapr_vllm.model_executor.storage.layout import round_up
from heapr_vllm.model_executor.storage.shares import tensor_parallel_shares
from heapr_vllm.model_executor.tuning.synthetic import PAPER_SHAPES, MoEShape, ragged_widths

SIMILAR = 1.25  # layers whose mean widths differ by less share one job


@dataclass(frozen=True)
class Job:
    """Stored widths of one layer to tune for.

    `dtype`: the model's. `scheme`: of experts in 8 or 4 bits; None in `dtype`. `activation_bits`: as of the kernel.
    """

    moe: MoEShape
    widths: tuple[int, ...]
    dtype: torch.dtype
    scheme: ExpertScheme | None = None
    activation_bits: int | None = None

    @property
    def shape(self) -> LayerShape:
        sizes = list(self.widths), self.moe.hidden_size, self.moe.top_k
        return LayerShape.of(*sizes, self.dtype, self.scheme, self.activation_bits)


def jobs_of_shapes(
    names: Sequence[str],
    sparsities: Sequence[float],
    dtype: torch.dtype,
    tp_size: int = 1,
    quantize: str | None = None,
) -> list[Job]:
    """One job per named shape of the paper and sparsity, for experts in `dtype`, or "int8", "fp8" or "int4".

    Raises HeaprError for an unknown name, or if the kernel does not run such experts.
    """
    jobs = []
    for name in names:
        if name not in PAPER_SHAPES:
            raise HeaprError(f"unknown shape {name!r}; choose from {', '.join(PAPER_SHAPES)}, or pass a pruned model")
        moe = PAPER_SHAPES[name]
        scheme = _wanted(quantize, moe.hidden_size)
        for sparsity in sparsities:
            widths = ragged_widths(moe.num_experts, moe.moe_intermediate_size, sparsity)
            jobs.append(Job(moe, _stored(widths, tp_size), dtype, scheme))
    return _checked(jobs)


def jobs_of_model(
    directory: Path, dtype: torch.dtype | None = None, tp_size: int = 1, quantize: str | None = None
) -> list[Job]:
    """Jobs for a masks repository or compact checkpoint: layers of similar mean width share one.

    `dtype` None and `quantize` None ("int8", "fp8", "int4", or "none" for `dtype`) take the model's. Raises HeaprError
    if `directory` holds no masks or does not say how experts are stored, or its config names no top-k or experts that
    the kernel does not run.
    """
    masks = read_masks(directory)
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise HeaprError(f"{config_file} is missing; pass the directory that `heapr prune` or `heapr export` wrote")
    checkpoint = Checkpoint(directory)
    text = checkpoint.text
    top_k, hidden_size = text.num_experts_per_tok, text.hidden_size
    if not top_k or not hidden_size:
        raise HeaprError(f"{config_file} names no num_experts_per_tok or hidden_size; tune a --shape instead")
    dtype = dtype or getattr(torch, str(text.dtype or text.torch_dtype or "bfloat16"))
    scheme = _wanted(quantize, hidden_size) if quantize else served_scheme(checkpoint, hidden_size)
    scheme = scheme.widened() if scheme else None  # as the kernel that is tuned gets it
    jobs: list[Job] = []
    for prefix in sorted(masks.keep, key=lambda prefix: (int(masks.widths[prefix].sum()), natural_order(prefix))):
        widths = _stored(masks.widths[prefix].tolist(), tp_size)
        job = Job(MoEShape(len(widths), top_k, hidden_size, masks.keep[prefix].shape[1]), widths, dtype, scheme)
        if any(widths) and not (jobs and job.shape.distance(jobs[-1].shape) < SIMILAR):
            jobs.append(job)
    return _checked(jobs)


def _wanted(quantize: str | None, hidden_size: int) -> ExpertScheme | None:
    return None if quantize in (None, "none") else ExpertScheme.for_hidden_size(quantize, hidden_size)


def with_rounded_activations(jobs: Sequence[Job]) -> list[Job]:
    """Returns the jobs for the kernel that rounds activations to 8 bits.

    Raises HeaprError if it does not run their layers here.
    """
    return _checked([replace(job, activation_bits=8) for job in jobs])


def _checked(jobs: list[Job]) -> list[Job]:
    """Returns the jobs. Raises HeaprError if the kernel does not run their layers here."""
    for job in jobs:
        obstacle = layer_obstacle(
            job.dtype, job.moe.hidden_size, job.scheme, job.activation_bits, has_e4m3=gpu_has_e4m3()
        )
        if obstacle:
            kernel, remedy = ("triton_a8", "; or drop --round-activations") if job.activation_bits else ("triton", "")
            raise HeaprError(f"there are no tiles to tune for {kernel}: {obstacle}{remedy}")
    return jobs


def _stored(widths: list[int], tp_size: int) -> tuple[int, ...]:
    """Widths as the first tensor-parallel rank stores them."""
    shares = tensor_parallel_shares(widths, tp_size, 0, TRITON_UNIT)
    return tuple(round_up(stop - start, TRITON_UNIT) for start, stop in shares)
