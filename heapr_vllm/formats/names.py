# SPDX-License-Identifier: Apache-2.0
"""Names of checkpoint tensors: which layer, which expert, which projection."""

from __future__ import annotations

import re
from dataclasses import dataclass

_EXPERT = re.compile(
    r"(?P<prefix>.+\.experts)\.(?P<expert>\d+)\.(?P<projection>gate_proj|up_proj|down_proj|w1|w2|w3)"
    r"\.weight"
)
_STACKED = re.compile(r"(?P<prefix>.+\.experts)\.(?P<projection>gate_up_proj|down_proj)")
_SHARD = {
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "w1": "w1",
    "w2": "w2",
    "w3": "w3",
    "gate_up_proj": "w13",
}


@dataclass(frozen=True)
class ExpertTensor:
    """Where a checkpoint tensor belongs.

    `shard`: "w1" gate [I, H], "w3" up [I, H], "w2" down [H, I]; `expert` is None for a stacked tensor, whose "w13" is
    gate_up [E, 2I, H] and whose "w2" is [E, H, I].
    """

    prefix: str
    expert: int | None
    shard: str

    @classmethod
    def parse(cls, name: str) -> ExpertTensor | None:
        """Parses a tensor's name; None if `name` is not a routed expert's weight."""
        if match := _EXPERT.fullmatch(name):
            return cls(match["prefix"], int(match["expert"]), _SHARD[match["projection"]])
        if match := _STACKED.fullmatch(name):
            return cls(match["prefix"], None, _SHARD[match["projection"]])
        return None


def layer_index(prefix: str) -> int:
    """Finds the number of the decoder layer in a module name; -1 if there is none."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", prefix)
    return int(match[1]) if match else -1


def is_draft_layer(prefix: str, num_layers: int | None) -> bool:
    """Tells whether a module belongs to multi-token prediction, whose experts are never pruned.

    Such layers are called mtp (Qwen3-Next), or are numbered after the model's own `num_layers` (DeepSeek-V3).
    """
    is_named = any(part.startswith("mtp") for part in prefix.split("."))
    return is_named or (num_layers is not None and layer_index(prefix) >= num_layers)


def natural_order(name: str) -> list[int | str]:
    """Makes a sort key that puts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
