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

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from heapr_vllm.model_executor.triton_kernels import ragged_down_kernel, ragged_up_kernel
from heapr_vllm.model_executor.triton_moe import default_config, use_one_route_blocks

ARCHES = {"sm_90a": 90, "sm_80": 80}
PAPER_MODELS = {"Qwen3-30B-A3B": (128, 8, 2048), "DeepSeekMoE-16B": (64, 6, 2048), "Qwen1.5-MoE-A2.7B": (60, 4, 2048),
                "Qwen2-57B-A14B": (64, 8, 3584)}
TOKENS = (1, 8, 32, 64, 256, 1024, 4096, 8192)
POINTERS = {"x": "*bf16", "w13": "*bf16", "w2": "*bf16", "hidden": "*bf16", "routed": "*bf16", "table": "*i32",
            "route_ids": "*i32", "block_slots": "*i32", "num_rows": "*i32"}


def variants(arch: str) -> Iterator[tuple]:
    """Distinct (kernel, constexprs, warps, stages) that the defaults use for the paper's models on `arch`."""
    seen = set()
    for num_experts, top_k, hidden in PAPER_MODELS.values():
        for tokens in TOKENS:
            config = default_config(tokens, top_k, num_experts, hidden, hopper=ARCHES[arch] >= 90)
            one_route = use_one_route_blocks(tokens, top_k, num_experts)
            for kernel, tile in ((ragged_up_kernel, config.up), (ragged_down_kernel, config.down)):
                meta = tile.meta()
                warps, stages = meta.pop("num_warps"), meta.pop("num_stages")
                constexprs = {"H": hidden, "BLOCK_M": config.block_m, "ONE_ROUTE": one_route, "PRECISION": "tf32",
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
