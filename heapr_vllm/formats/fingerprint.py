# SPDX-License-Identifier: Apache-2.0
"""What ties masks to a model: sha256 of its routers and of the shapes of its experts."""

from __future__ import annotations

import hashlib
import re
from itertools import chain

import torch

from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.reader import TensorReader

ROUTERS = "routers:"  # fingerprints start with what they are taken of
ALL_TENSORS = "sha256:"  # of earlier versions
_ROUTER = re.compile(r"(?P<module>.+)\.(gate|router)\.weight")


def fingerprint(checkpoint: Checkpoint) -> str:
    """Computes sha256 over shapes of the routed experts and over the router weights.

    Masks are valid for exactly the routers they were calibrated with, and routers are small to read. They are the
    same in a model and its quantized siblings, which share masks.
    """
    digest = hashlib.sha256()
    modules = set()
    for prefix, shape in checkpoint.expert_shapes().items():
        digest.update(f"{prefix} {shape}\n".encode())
        modules.add(prefix.rpartition(".")[0])
    with TensorReader(checkpoint, torch.float32) as reader:
        for name in sorted(checkpoint.weight_map):
            router = _ROUTER.fullmatch(name)
            if router and router["module"] in modules:
                digest.update(reader.tensor(name).float().numpy().tobytes())
    return f"{ROUTERS}{digest.hexdigest()}"


def former_fingerprint(checkpoint: Checkpoint) -> str:
    """Computes the fingerprint of earlier versions, over names, dtypes and shapes of all tensors too."""
    digest = hashlib.sha256()
    for name, header in sorted(checkpoint.headers.items()):
        digest.update(f"{name} {header}\n".encode())
    with TensorReader(checkpoint) as reader:
        for name in filter(_ROUTER.fullmatch, chain.from_iterable(checkpoint.shards.values())):
            for tensor in reader.verbatim(name).values():
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return f"{ALL_TENSORS}{digest.hexdigest()}"


def matches(checkpoint: Checkpoint, expected: str | None) -> bool:
    """Tells whether the checkpoint, or its sibling in another dtype, has this fingerprint; None matches all."""
    if expected is None:
        return True
    is_former = expected.startswith(ALL_TENSORS)
    return expected == (former_fingerprint(checkpoint) if is_former else fingerprint(checkpoint))
