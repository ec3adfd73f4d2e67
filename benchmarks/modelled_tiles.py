# SPDX-License-Identifier: Apache-2.0
"""Tiles that stock vLLM, our kernels before the change of November 2026 and our kernels now run. No GPU is used.

Only what `benchmarks.layer_kernels` needs is kept of a tile.
"""

import importlib.util
import json
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from heapr_vllm.model_executor.kernels.triton.tiles import LayerShape, default_config
from heapr_vllm.model_executor.tuning.synthetic import MoEShape

H200_FILE = "NVIDIA_H200"  # as vLLM writes a device in the names of its files
TUNED_SHAPES = ((128, 768), (64, 2560))  # experts and width of the paper's models that vLLM has an H200 file for


class GemmTile(NamedTuple):
    """One CTA of a GEMM: `block_n` outputs by `block_k` inputs per step."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages}"


class LayerTiles(NamedTuple):
    """Both GEMMs over blocks of `block_m` routes; `source` says who chose them."""

    block_m: int
    up: GemmTile
    down: GemmTile
    source: str

    def __str__(self) -> str:
        return f"{self.block_m} rows, up {self.up}, down {self.down}"


def stock_tiles(moe: MoEShape, tokens: int, device: str = H200_FILE) -> LayerTiles:
    """vLLM's: from the bf16 file for `device` if the installed vLLM ships one for this shape, else its defaults."""
    entries = _stock_file(moe.num_experts, moe.moe_intermediate_size, device)
    if not entries:
        return _from_stock(stock_defaults(tokens), "vLLM's defaults")
    return _from_stock(entries[min(entries, key=lambda tuned: abs(tuned - tokens))], f"vLLM's {device} file")


def stock_candidates(moe: MoEShape, tokens: int) -> list[LayerTiles]:
    """What tuning vLLM would choose from: its file for this shape, else its defaults and the tiles of other files."""
    shipped = stock_tiles(moe, tokens)
    if _stock_file(moe.num_experts, moe.moe_intermediate_size, H200_FILE):
        return [shipped]
    routes = tokens * moe.top_k / moe.num_experts
    entries = chain.from_iterable(_stock_file(*shape, H200_FILE).values() for shape in TUNED_SHAPES)
    tiles = dict.fromkeys(_from_stock(entry, "the model's choice for vLLM") for entry in entries)
    return [shipped, *(tile for tile in tiles if routes / 8 <= tile.block_m <= max(16, 4 * routes))]


def stock_defaults(tokens: int) -> dict[str, int]:
    """`get_default_config` of vLLM 0.32 for bf16 on NVIDIA, where vLLM need not be installed."""
    return {
        "BLOCK_SIZE_M": 16 if tokens <= 32 else 32 if tokens <= 96 else 64 if tokens <= 512 else 128,
        "BLOCK_SIZE_N": 64 if tokens <= 64 else 128,
        "BLOCK_SIZE_K": 128 if tokens <= 64 else 64,
        "num_warps": 4 if tokens <= 128 else 8,
        "num_stages": 4 if tokens <= 32 else 3,
    }


def _from_stock(config: dict[str, int], source: str) -> LayerTiles:
    tile = GemmTile(*(config[key] for key in ("BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_warps", "num_stages")))
    return LayerTiles(config["BLOCK_SIZE_M"], tile, tile, source)


@cache
def _stock_file(num_experts: int, width: int, device: str) -> dict[int, dict[str, int]]:
    """Token count to configuration for bf16; empty if there is no vLLM here or it has no such file."""
    name = f"E={num_experts},N={width},device_name={device}.json"
    spec = importlib.util.find_spec("vllm")  # does not import it
    for folder in spec.submodule_search_locations or [] if spec else []:
        path = Path(folder) / "model_executor" / "layers" / "fused_moe" / "configs" / name
        if path.is_file():
            return {int(key): entry for key, entry in json.loads(path.read_text()).items() if key.isdigit()}
    return {}


def tiles_before(moe: MoEShape, widths: list[int], tokens: int) -> LayerTiles:
    """Our defaults on Hopper before the change (commit c9db1ee), for the hidden sizes of the paper's models."""
    routes = tokens * moe.top_k / sum(width > 0 for width in widths)
    if routes <= 16:
        block_m, up, down = 16, GemmTile(32, 128, 4, 4), GemmTile(64, 64, 4, 4)
    elif routes <= 64:
        block_m, up, down = 32 if routes <= 32 else 64, GemmTile(64, 64, 4, 4), GemmTile(128, 64, 4, 4)
    else:
        block_m, up, down = 128, GemmTile(128, 64, 8, 4), GemmTile(256, 64, 8, 3)
    return LayerTiles(block_m, up, down, "defaults of c9db1ee")


def tiles_after(moe: MoEShape, widths: list[int], tokens: int) -> LayerTiles:
    """Our defaults as the code is now, on Hopper."""
    shape = LayerShape.of(widths, moe.hidden_size, moe.top_k, torch.bfloat16)
    config = default_config(tokens, shape, hopper=True)
    up, down = (
        GemmTile(tile.block_n, tile.block_k, tile.num_warps, tile.num_stages) for tile in (config.up, config.down)
    )
    return LayerTiles(config.block_m, up, down, "defaults of the code")
