# SPDX-License-Identifier: Apache-2.0
"""A mix of texts: what each is called, where it is read, and how many of the samples it gives."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune.text.records import is_file, stem

TOLERANCE = 1e-6  # of the sum of shares
_NAMED = re.compile(r"(?:(?P<name>[\w.-]+)=)?(?P<spec>.+?)(?::(?P<share>[-+.\w]+))?", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """One text of a mix; `share`: its part of the samples."""

    name: str
    spec: str
    share: Fraction


def parse_sources(specs: str | Sequence[str]) -> list[Source]:
    """Reads `[name=]spec[:share]` of every source.

    Without a name it is called as the file without its endings, or as the dataset; without shares all are equal. Raises
    HeaprError unless names differ and shares are positive and add up to 1.
    """
    parsed = [_parse(spec) for spec in ([specs] if isinstance(specs, str) else specs)]
    if not parsed:
        raise HeaprError("no dataset is named; say which with --dataset SPEC")
    names = Counter(name for name, _, _ in parsed)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise HeaprError(f"two sources are called {repeated[0]}; give each a name of its own: NAME=SPEC")
    shares = [share for _, _, share in parsed if share is not None]
    if not shares:
        shares = [Fraction(1, len(parsed))] * len(parsed)
    if len(shares) < len(parsed):
        missing = next(name for name, _, share in parsed if share is None)
        raise HeaprError(
            f"source {missing} has no share, but others have; write SPEC:SHARE for all of them or for none"
        )
    check_shares(dict(zip(names, shares, strict=True)))
    total = sum(shares)
    return [Source(name, spec, share / total) for (name, spec, _), share in zip(parsed, shares, strict=True)]


def check_shares(shares: Mapping[str, float | Fraction]) -> None:
    """Raises HeaprError unless shares by source are none below 0 and add up to 1."""
    for name, share in shares.items():
        if not 0 <= share <= 1 + TOLERANCE:
            raise HeaprError(f"the share of {name} is {float(share):g}; give it one from 0 to 1")
    total = sum(shares.values())
    if abs(total - 1) > TOLERANCE:
        raise HeaprError(f"the shares of the sources add up to {float(total):.9g}; change them so that it is 1")


def parse_mix(text: str) -> dict[str, float]:
    """Reads `code=0.7,chat=0.3`. Raises HeaprError if it is not that, or shares do not add up to 1."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        try:
            shares[name] = float(share)
        except ValueError as error:
            raise HeaprError(f"--mix {text} is not like code=0.7,chat=0.3; name sources and shares") from error
    check_shares(shares)
    return shares


def share_out(sources: Sequence[Source], num_samples: int) -> list[int]:
    """Counts the samples of every source: they add up to `num_samples`, rounded by largest remainders.

    Raises HeaprError if a source would get none.
    """
    quotas = [source.share * num_samples for source in sources]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(sources)), key=lambda index: counts[index] - quotas[index])
    for index in by_remainder[: num_samples - sum(counts)]:
        counts[index] += 1
    for source, count in zip(sources, counts, strict=True):
        if count == 0:
            raise HeaprError(
                f"source {source.name} gets none of {num_samples} samples; ask for {math.ceil(1 / source.share)} or "
                "more with --num-calibration-samples, raise its share, or leave it out"
            )
    return counts


def _parse(text: str) -> tuple[str, str, Fraction | None]:
    """Takes a source apart: name, spec, share. A path that exists is one, whatever is in it."""
    if text and Path(text).exists():
        return stem(text), text, None
    name, spec, number = _split(text)
    if number is not None and not 0 < number < math.inf:
        raise HeaprError(f"the share of {spec} is {number:g}; give it more than 0, or leave the source out")
    fraction = None if number is None else Fraction(number).limit_denominator(10**9)
    if fraction == 0:
        raise HeaprError(f"the share of {spec} is {number:g}, less than one in 10^9; raise it, or leave the source out")
    return name or stem(spec), spec, fraction


def _split(text: str) -> tuple[str | None, str, float | None]:
    """Does as `_parse` without looking at any file: name if there is one, spec, share."""
    match = _NAMED.fullmatch(text)
    if match is None:
        raise HeaprError("a dataset spec is empty; write a file or name[subset](split)")
    name, spec, share = match.group("name", "spec", "share")
    try:
        return name, spec, None if share is None else float(share)
    except ValueError:
        return name, f"{spec}:{share}", None


def public_name(text: str) -> str:
    """Names a source without telling where on this machine it lies: files by name, datasets of the Hub by their spec.

    Raises HeaprError if it is empty.
    """
    name, spec, _ = _split(text)
    return name or Path(spec).name if is_file(spec) or spec.startswith(("/", ".", "~")) else spec
