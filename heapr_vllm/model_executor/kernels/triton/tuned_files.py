# SPDX-License-Identifier: Apache-2.0
"""Which tiles a layer runs with: tuned ones from JSON where there are any, otherwise the defaults of `tiles.py`.

A tuned file covers one hidden size, top-k, dtype, way to store experts and GPU, and holds per width profile and token
count the fastest tiles found by `heapr tune`. Folders are searched in this order: HEAPR_CONFIG_FOLDER, the user's
cache, the package.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from heapr_vllm.model_executor.kernels.triton.tiles import LayerShape, TileConfig, default_config

FORMAT_VERSION = 2
PACKAGED_FOLDER = Path(__file__).parent / "tile_configs"
BATCH_INVARIANT_ROUTES = 40  # per expert: the middle of the default tiles
MAX_RATIO = 1.6  # a tuned profile serves shapes whose number of experts times mean width differ by less than this
logger = logging.getLogger(f"vllm.{__name__}")  # vLLM configures loggers below its own name only


def choose_config(shape: LayerShape, num_tokens: int) -> TileConfig:
    """Tiles for `num_tokens` tokens of this layer: tuned for the nearest profile and token count, or the defaults.

    With vLLM's VLLM_BATCH_INVARIANT=1 one configuration serves every token count: the sums of a token then run in the
    same order, whoever it shares a batch with.
    """
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") != "0":
        return default_config(BATCH_INVARIANT_ROUTES * shape.num_experts // shape.top_k, shape)
    tuned = _tuned(shape, device_name())
    if not tuned:
        return default_config(num_tokens, shape)
    config = tuned[min(tuned, key=lambda tokens: abs(math.log(tokens / max(num_tokens, 1))))]
    is_crowded = num_tokens * shape.top_k > shape.num_experts  # a block per route would read experts several times
    return replace(config, one_route=False) if is_crowded else config


def configs_up_to(shape: LayerShape, max_tokens: int) -> list[TileConfig]:
    """All configurations that batches of up to `max_tokens` tokens get; token counts are tried in steps of 5 %."""
    steps = math.ceil(math.log(max_tokens, 1.05))
    counts = {min(math.ceil(1.05**power), max_tokens) for power in range(steps + 1)}
    return list(dict.fromkeys(choose_config(shape, tokens) for tokens in sorted(counts)))


def user_folder() -> Path:
    """Where `heapr tune` writes and the plugin looks: HEAPR_CONFIG_FOLDER, or the user's cache."""
    if folder := os.environ.get("HEAPR_CONFIG_FOLDER"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "heapr_vllm" / "tile_configs"


@cache
def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


@cache
def _tuned(shape: LayerShape, device: str) -> dict[int, TileConfig]:
    """Token count to tuned tiles of the nearest profile, the first folder winning ties; empty if none is near."""
    profiles = [
        (
            shape.distance(replace(shape, num_experts=profile["num_experts"], mean_width=profile["mean_width"])),
            path,
            profile,
        )
        for path, profile in _profiles(shape, device)
    ]
    distance, path, profile = min(profiles, key=lambda entry: entry[0], default=(math.inf, None, {}))
    if distance > MAX_RATIO:
        _announce(
            f"default tiles, none are tuned for hidden size {shape.hidden_size}, top-{shape.top_k} and these "
            f"widths on {device}; `heapr tune` finds faster ones"
        )
        return {}
    try:
        configs = {int(tokens): TileConfig.from_dict(entry) for tokens, entry in profile["tokens"].items()}
        for config in configs.values():
            config.check(shape)
    except (KeyError, TypeError, ValueError) as error:
        _announce(f"default tiles, {path} is damaged ({type(error).__name__}: {error}); run `heapr tune` again")
        return {}
    _announce(f"tiles tuned on {device}, from {path}")
    return configs


def _profiles(shape: LayerShape, device: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    for folder in (user_folder(), PACKAGED_FOLDER):
        path = folder / shape.file_name(device)
        if path.is_file():
            for profile in read_profiles(path):
                if profile["tokens"]:
                    yield path, profile


def read_profiles(path: Path) -> list[dict[str, Any]]:
    """Profiles of a tuned file; none if it is missing, damaged or of another format."""
    try:
        content = json.loads(path.read_text())
        return content["profiles"] if content["format_version"] == FORMAT_VERSION else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


@cache
def _announce(message: str) -> None:
    """Logs `message` once, however many layers ask."""
    logger.info("heapr::ragged_moe: %s", message)


def profile_entry(shape: LayerShape) -> dict[str, Any]:
    """A new, empty profile of a tuned file."""
    return {
        "num_experts": shape.num_experts,
        "mean_width": shape.mean_width,
        "max_width": shape.max_width,
        "tokens": {},
    }


def token_entry(config: TileConfig, microseconds: float) -> dict[str, Any]:
    """One token count of a profile: the tiles and the time of the layer with them."""
    return {**asdict(config), "microseconds": round(microseconds, 2)}
