# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for a GPU that is not here and reports what ptxas made of them, as JSON lines.

`TRITON_INTERPRET=0 python -m tests.model_executor.compile_kernels`
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from heapr_vllm.model_executor.synthetic import PAPER_SHAPES
from heapr_vllm.model_executor.tile_config import PACKAGED_FOLDER, LayerShape, TileConfig, default_config
from heapr_vllm.model_executor.triton_kernels import ragged_down_kernel, ragged_up_kernel
from heapr_vllm.model_executor.triton_moe import use_one_route_blocks

ARCHES = {"sm_90a": 90, "sm_80": 80}
TOKENS = (1, 8, 32, 64, 256, 1024, 4096, 8192)
POINTERS = {"x": "*bf16", "w13": "*bf16", "w2": "*bf16", "hidden": "*bf16", "routed": "*bf16", "table": "*i32",
            "route_ids": "*i32", "block_slots": "*i32", "num_rows": "*i32"}


def configs(arch: str) -> Iterator[tuple[int, int, TileConfig, bool]]:
    """(hidden size, top-k, tiles, one route per block) of the paper's models, and of every tuned file we ship."""
    for moe in (moe for name, moe in PAPER_SHAPES.items() if name != "tiny"):
        shape = LayerShape(moe.hidden_size, moe.top_k, moe.num_experts, moe.moe_intermediate_size,
                           moe.moe_intermediate_size, torch.bfloat16)
        for tokens in TOKENS:
            yield (shape.hidden_size, shape.top_k, default_config(tokens, shape, hopper=ARCHES[arch] >= 90),
                   use_one_route_blocks(tokens, shape.top_k, shape.num_experts))
    for path in PACKAGED_FOLDER.glob("*.json") if ARCHES[arch] >= 90 else ():
        hidden_size, top_k = map(int, re.match(r"hidden_size=(\d+),top_k=(\d+),", path.name).groups())
        for profile in json.loads(path.read_text())["profiles"]:
            for tokens, entry in profile["tokens"].items():
                yield (hidden_size, top_k, TileConfig.from_dict(entry),
                       use_one_route_blocks(int(tokens), top_k, profile["num_experts"]))


def variants(arch: str) -> Iterator[tuple]:
    """Distinct (kernel, constexprs, warps, stages) among the configurations for `arch`."""
    seen = set()
    for hidden_size, top_k, config, one_route in configs(arch):
        for kernel, tile in ((ragged_up_kernel, config.up), (ragged_down_kernel, config.down)):
            meta = tile.meta()
            warps, stages = meta.pop("num_warps"), meta.pop("num_stages")
            constexprs = {"H": hidden_size, "BLOCK_M": config.block_m, "ONE_ROUTE": one_route, "PRECISION": "tf32",
                          **meta} | ({"TOP_K": top_k} if kernel is ragged_up_kernel else {})
            key = (kernel.fn.__name__, *constexprs.items(), warps, stages)
            if key not in seen:
                seen.add(key)
                yield kernel, constexprs, warps, stages


def compile_one(arch: str, kernel, constexprs: dict, warps: int, stages: int) -> dict:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constexprs else POINTERS.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if name in POINTERS or name.startswith("stride")}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constexprs.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", ARCHES[arch], 32),
                              options={"num_warps": warps, "num_stages": stages})
    ptx = compiled.asm["ptx"]
    log = assemble(ptx, arch)
    registers, = map(int, re.findall(r"Used (\d+) registers", log))
    return {"kernel": kernel.fn.__name__, "arch": arch, **constexprs, "warps": warps, "stages": stages,
            "registers": registers, "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
            "shared_bytes": compiled.metadata.shared, "wgmma": "wgmma.mma_async" in ptx, "cp_async": "cp.async" in ptx}


def assemble(ptx: str, arch: str) -> str:
    """ptxas's verbose output for `ptx`."""
    ptxas = get_ptxas(ARCHES[arch]).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        return subprocess.run([ptxas, "-v", "--gpu-name", arch, "-o", Path(folder) / "kernel.cubin", source],
                              check=True, capture_output=True, text=True).stderr


def main() -> None:
    jobs = [(arch, *variant) for arch in ARCHES for variant in variants(arch)]
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(lambda job: compile_one(*job), jobs):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
