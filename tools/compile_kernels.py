# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for GPUs that are not here and prints what this Triton and ptxas made of them, as CSV.

`TRITON_INTERPRET=0 python -m tools.compile_kernels sm_90a`; `compile_table` does it with every Triton.
"""

import csv
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from heapr_vllm.formats.quantized import CODE_DTYPES, GROUP_SIZE, GROUP_SIZE_4_BITS, ExpertScheme
from heapr_vllm.model_executor.kernels.triton.a8_jit import a8_down_kernel, a8_up_kernel, round_rows_kernel
from heapr_vllm.model_executor.kernels.triton.jit import combine_kernel, ragged_down_kernel, ragged_up_kernel
from heapr_vllm.model_executor.kernels.triton.launch import PREFETCHED_SLABS
from heapr_vllm.model_executor.kernels.triton.tiles import DECODES, LayerShape, TileConfig, default_config
from heapr_vllm.model_executor.kernels.triton.tuned_files import PACKAGED_FOLDER
from heapr_vllm.model_executor.tuning.synthetic import PAPER_SHAPES
from tools import ptx

ARCHES = {"sm_90a": 90, "sm_80": 80}
TOKENS = (1, 8, 32, 64, 256, 1024, 4096, 8192)
TOKENS_OF_CODES = (1, 8, 32, 256, 512, 1024)  # one for every default tile of Qwen3-30B-A3B
POINTERS = {
    "x": "*bf16",
    "w13": "*bf16",
    "w13_scale": "*fp32",
    "w2": "*bf16",
    "w2_scale": "*fp32",
    "hidden": "*bf16",
    "routed": "*bf16",
    "output": "*bf16",
    "topk_weights": "*fp32",
    "topk_ids": "*i32",
    "table": "*i64",
    "route_ids": "*i32",
    "block_slots": "*i32",
    "num_rows": "*i32",
    "x_scale": "*fp32",
    "hidden_scale": "*fp32",
    "scales": "*fp32",
}
A8_GEMMS = (a8_up_kernel, a8_down_kernel)
SCHEMES = [
    ExpertScheme(kind, strategy=strategy, group_size=GROUP_SIZE if strategy == "group" else None)
    for kind in CODE_DTYPES
    for strategy in ("group", "channel")
] + [ExpertScheme(num_bits=4, group_size=GROUP_SIZE_4_BITS)]
ARGUMENTS = chain(ragged_up_kernel.arg_names, ragged_down_kernel.arg_names, combine_kernel.arg_names)
CONSTEXPRS = tuple(dict.fromkeys(name for name in ARGUMENTS if name.isupper()))


class Launch(NamedTuple):
    """One call of the Triton path: sizes, tiles, how experts are stored, and whether activations are rounded."""

    hidden_size: int
    top_k: int
    config: TileConfig
    scheme: ExpertScheme | None = None
    is_rounded: bool = False


class Variant(NamedTuple):
    """A kernel as it is compiled: its constexprs, warps and stages, and the type of its weights' pointers."""

    kernel: Any
    meta: dict[str, Any]
    weights: str = ""

    @property
    def key(self) -> tuple:
        return (self.kernel.fn.__name__, self.weights, *self.meta.values())


def variants_of(launch: Launch) -> Iterator[Variant]:
    """The kernels of `triton_ragged_moe` with the constexprs that it passes for bf16."""
    hidden_size, top_k, config, scheme, is_rounded = launch
    if is_rounded:
        yield from rounded_variants_of(launch)
        return
    weights = pointer_type(scheme, config)
    group = (scheme.group_size or hidden_size) if scheme else 0
    by_channel = scheme is not None and scheme.strategy == "channel"
    shared = {"H": hidden_size, **config.launch()}
    blocks = {"BLOCK_M": config.block_m, "ONE_ROUTE": config.one_route, "PRECISION": "tf32", "GROUP": group}
    up = {"TOP_K": top_k, "FUSED": config.fused}
    down = {"BY_CHANNEL": by_channel, "PREFETCH": PREFETCHED_SLABS if config.prefetch else 0}
    yield Variant(ragged_up_kernel, shared | up | blocks | config.up.meta(), weights)
    yield Variant(ragged_down_kernel, shared | down | blocks | config.down.meta(), weights)
    block_n = min(1024, triton.next_power_of_2(hidden_size))  # ty: ignore[invalid-argument-type]  # it takes itself
    yield Variant(combine_kernel, shared | {"TOP_K": top_k, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 3})


def rounded_variants_of(launch: Launch) -> Iterator[Variant]:
    """`variants_of` without the kernel that combines, which is the same."""
    hidden_size, top_k, config, scheme, _ = launch
    assert scheme is not None
    weights = {"int": "i8", "float": "fp8e4nv"}[scheme.type]
    block_n = min(1024, triton.next_power_of_2(hidden_size))  # ty: ignore[invalid-argument-type]  # it takes itself
    shared = {"H": hidden_size, **config.launch()}
    blocks = {"BLOCK_M": config.block_m, "ONE_ROUTE": config.one_route}
    rows = {"BLOCK_N": block_n, "BLOCK_K": config.up.block_k, "num_warps": 4, "num_stages": 3}
    up = {"TOP_K": top_k, "GROUP": scheme.group_size or hidden_size}
    yield Variant(round_rows_kernel, shared | rows, weights)
    yield Variant(a8_up_kernel, shared | blocks | up | config.up.sizes(), weights)
    down = {"BY_CHANNEL": scheme.strategy == "channel"}
    yield Variant(a8_down_kernel, shared | blocks | down | config.down.sizes(), weights)


def pointer_type(scheme: ExpertScheme | None, config: TileConfig) -> str:
    """The type of a pointer to weights in Triton's spelling, without the star."""
    if scheme is None:
        return "bf16"
    if scheme.type == "int":
        return "u16" if scheme.num_bits == 4 else "i8"
    return {"bits": "u8", "cast": "fp8e4nv"}[config.decode]


def launches(arch: str) -> Iterator[Launch]:
    """Those of the paper's models with default tiles, of the first one's every way to run, and of files we ship."""
    is_hopper = ARCHES[arch] >= 90
    for name, moe in PAPER_SHAPES.items():
        if name == "tiny":
            continue
        shape = LayerShape(
            moe.hidden_size,
            moe.top_k,
            moe.num_experts,
            moe.moe_intermediate_size,
            moe.moe_intermediate_size,
            torch.bfloat16,
        )
        for tokens in TOKENS:
            default = default_config(tokens, shape, hopper=is_hopper)
            switched = ways_to_run(default) if is_hopper and name == next(iter(PAPER_SHAPES)) else []
            for config in (default, *switched):
                yield Launch(shape.hidden_size, shape.top_k, config)
        if name == next(iter(PAPER_SHAPES)):
            yield from launches_of_codes(shape, is_hopper)
    for path in PACKAGED_FOLDER.glob("*.json") if is_hopper else ():
        hidden_size, top_k = map(int, re.findall(r"(?:hidden_size|top_k)=(\d+),", path.name))
        for profile in json.loads(path.read_text())["profiles"]:
            for entry in profile["tokens"].values():
                yield Launch(hidden_size, top_k, TileConfig.from_dict(entry))


def launches_of_codes(shape: LayerShape, is_hopper: bool) -> Iterator[Launch]:
    """Those of a model with every kind of codes: default tiles, and every decode that this GPU has."""
    for scheme, tokens in product(SCHEMES, TOKENS_OF_CODES):
        config = default_config(tokens, replace(shape, scheme=scheme), hopper=is_hopper)
        decodes = DECODES if is_hopper and scheme.type == "float" else ("bits",)
        for decode in decodes:
            yield Launch(shape.hidden_size, shape.top_k, replace(config, decode=decode), scheme)
        if scheme.num_bits == 8 and (is_hopper or scheme.type == "int"):  # sm_80 does not multiply E4M3
            rounded = default_config(tokens, replace(shape, scheme=scheme, activation_bits=8), hopper=is_hopper)
            for config in (rounded, replace(rounded, chained=True))[: 1 + is_hopper]:
                yield Launch(shape.hidden_size, shape.top_k, config, scheme, is_rounded=True)


def ways_to_run(config: TileConfig) -> list[TileConfig]:
    """`config` with each of the switches for Hopper the other way."""
    tma = replace(config, up=replace(config.up, tma=True), down=replace(config.down, tma=True))
    return [
        replace(config, fused=not config.fused),
        tma,
        replace(config, chained=True),
        replace(config, chained=True, prefetch=True),
    ]


def variants(arch: str) -> list[Variant]:
    """Distinct kernels among the launches for `arch`, in a stable order."""
    found = chain.from_iterable(map(variants_of, launches(arch)))
    return sorted({variant.key: variant for variant in found}.values(), key=lambda variant: variant.key)


def source_of(variant: Variant) -> ASTSource:
    """The kernel with the argument types and alignments of a launch."""
    kernel, meta, names = variant.kernel, variant.meta, variant.kernel.arg_names
    types = POINTERS | {"w13": f"*{variant.weights}", "w2": f"*{variant.weights}"}
    types |= descriptors(variant) if meta.get("TMA") else {}
    types |= rounded_types(variant)
    fixed = meta | {"w13_scale": None, "w2_scale": None} if variant.weights == "bf16" else meta
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    constexprs = {(i,): fixed[name] for i, name in enumerate(names) if name in fixed}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in fixed and (types.get(name, "").startswith("*") or name.startswith("stride"))
    }
    return ASTSource(kernel, signature, constexprs, aligned)


def descriptors(variant: Variant) -> dict[str, str]:
    """Types of the arguments that a launch with TMA passes as descriptors."""
    block_m, block_n, block_k = (variant.meta[f"BLOCK_{axis}"] for axis in "MNK")
    if variant.kernel is ragged_up_kernel:
        return {"w13": f"tensordesc<bf16[{2 * block_n}, {block_k}]>"}
    return {"hidden": f"tensordesc<bf16[{block_m}, {block_k}]>", "w2": f"tensordesc<bf16[{block_n}, {block_k}]>"}


def rounded_types(variant: Variant) -> dict[str, str]:
    """Types of the arguments that kernels for rounded activations have otherwise."""
    codes = f"*{variant.weights}"
    if variant.kernel is round_rows_kernel:
        return {"codes": codes}
    if variant.kernel not in A8_GEMMS:
        return {}
    return {"x": codes, "hidden": codes} | ({} if variant.meta.get("BY_CHANNEL") else {"w2_scale": "*bf16"})


def compile_one(arch: str, variant: Variant) -> dict[str, Any]:
    """A row of the table."""
    options = {name: variant.meta[name] for name in ("num_warps", "num_stages", "launch_pdl") if name in variant.meta}
    compiled = triton.compile(source_of(variant), target=GPUTarget("cuda", ARCHES[arch], 32), options=options)
    assembly = compiled.asm["ptx"]
    log = assemble(assembly, arch)
    (registers,) = map(int, re.findall(r"Used (\d+) registers", log))
    loads, stores, copies = ptx.loads(assembly), ptx.stores(assembly), ptx.async_copies(assembly)
    return {
        "triton": triton.__version__,
        "arch": arch,
        "kernel": variant.kernel.fn.__name__,
        "weights": variant.weights,
        **{name: variant.meta.get(name, "") for name in (*CONSTEXPRS, "num_warps", "num_stages")},
        "registers": registers,
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        "shared_bytes": compiled.metadata.shared,
        "loads": ptx.describe(loads),
        "narrow_loads": ptx.narrow(loads),
        "stores": ptx.describe(stores),
        "narrow_stores": ptx.narrow(stores),
        "async_16": copies[16],
        "async_other": copies.total() - copies[16],
        "wgmma": ptx.wgmmas(assembly),
        "tma": ptx.tma_copies(assembly),
    }


def assemble(assembly: str, arch: str) -> str:
    """ptxas's verbose output."""
    ptxas = get_ptxas(ARCHES[arch]).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(assembly)
        return subprocess.run(
            [ptxas, "-v", "--gpu-name", arch, "-o", Path(folder) / "kernel.cubin", source],
            check=True,
            capture_output=True,
            text=True,
        ).stderr


def check_backend() -> None:
    """Raises RuntimeError if the compiler or ptxas is another Triton's: backends are found by entry point."""
    folder = Path(triton.__file__).parent
    for path in (inspect.getfile(backends["nvidia"].compiler), *(get_ptxas(number).path for number in ARCHES.values())):
        if not Path(path).is_relative_to(folder):
            raise RuntimeError(f"Triton {triton.__version__} in {folder} would compile with {path}")


def main() -> None:
    check_backend()
    (arch,) = sys.argv[1:]
    rows = [compile_one(arch, variant) for variant in variants(arch)]
    writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main()
