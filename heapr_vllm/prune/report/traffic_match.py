# SPDX-License-Identifier: Apache-2.0
"""How far the text of a calibration is from the traffic of a server, seen by the experts; and the mix that is nearest.

Two texts are compared by the shares of a layer's routes that its experts get, p and q: their total variation
1/2 sum |p_e - q_e| is the part of the routes that would have to move, from 0 to 1. Parts of one text differ too: where
n and m independent routes were counted, by 1/2 sum_e sqrt(2/pi p_e (1 - p_e) (1/n + 1/m)) on average.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.optimize import nnls

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.traffic import Traffic
from heapr_vllm.prune.calibration.moments import NeuronMoments
from heapr_vllm.prune.selection.served_traffic import check_same_model


@dataclass(frozen=True)
class SourceMatch:
    """`different`: total variation to the traffic, mean over layers. `by_chance`: that of parts of one text."""

    name: str
    different: float
    by_chance: float


@dataclass(frozen=True)
class TrafficMatch:
    """Of the whole text, and of every source of a mix; `mix`: the shares of sources nearest in least squares.

    `tokens`: that were served, in all `runs` of the server.
    """

    tokens: int
    runs: int
    sources: list[SourceMatch]
    mix: dict[str, float]
    mix_different: float

    def to_dict(self) -> dict[str, Any]:
        """Lists the fields, for `--json`."""
        return asdict(self)


def match_traffic(moments: NeuronMoments, traffic: Traffic) -> TrafficMatch:
    """Compares a calibration with traffic. Raises HeaprError as `check_same_model`."""
    check_same_model(moments, traffic)
    served = {prefix: layer.tokens for prefix, layer in traffic.layers.items()}
    counted = {
        name: {prefix: layer.tokens for prefix, layer in layers.items()} for name, layers in moments.sources.items()
    }
    goal = _shares(served)
    columns = torch.stack([_shares(tokens) for tokens in counted.values()], 1)
    weights = torch.from_numpy(nnls(columns.numpy(), goal.numpy())[0])
    if not weights.any():
        raise HeaprError("the traffic uses none of the experts that the calibration text does; calibrate on other text")
    weights /= weights.sum()
    texts = counted if len(counted) == 1 else {**counted, "all": moments.tokens}
    return TrafficMatch(
        tokens=traffic.tokens,
        runs=traffic.runs,
        sources=[
            SourceMatch(name, _variation(_shares(tokens), goal), _by_chance(tokens, served))
            for name, tokens in texts.items()
        ],
        mix=dict(zip(counted, weights.tolist(), strict=True)),
        mix_different=_variation(columns @ weights, goal),
    )


def format_match(match: TrafficMatch) -> str:
    """Lays a match out as a table, and the mix as what `heapr prune` takes."""
    lines = [
        f"{match.tokens:,} tokens served in {match.runs} run{'s' if match.runs > 1 else ''}",
        "",
        f"{'calibrated on':<24}{'routes that differ':>20}{'by chance':>12}",
    ]
    lines += [f"{each.name:<24}{each.different:>20.1%}{each.by_chance:>12.1%}" for each in match.sources]
    if len(match.mix) > 1:
        shares = ",".join(f"{name}={share:.2f}" for name, share in rounded(match.mix).items())
        lines += ["", f"nearest mix: --mix {shares}, {match.mix_different:.1%} differ"]
    return "\n".join(lines)


def rounded(shares: dict[str, float]) -> dict[str, float]:
    """Rounds to hundredths that add up to 1; shares of none are left out."""
    hundredths = {name: round(100 * share) for name, share in shares.items()}
    largest = max(hundredths, key=hundredths.__getitem__)
    hundredths[largest] += 100 - sum(hundredths.values())
    return {name: count / 100 for name, count in hundredths.items() if count}


def _shares(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """float64 [all experts of all layers]: each one's share of its layer's routes, over the number of layers."""
    parts = [counts.double() / counts.sum().clamp(min=1) for _, counts in sorted(tokens.items())]
    return torch.cat(parts) / len(parts)


def _variation(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first - second).abs().sum().item() / 2


def _by_chance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    found = []
    for prefix, counts in first.items():
        n, m = int(counts.sum()), int(second[prefix].sum())
        share = (counts + second[prefix]).double() / (n + m)
        found.append((share * (1 - share)).sqrt().sum().item() * math.sqrt(2 / math.pi * (1 / n + 1 / m)) / 2)
    return sum(found) / len(found)
