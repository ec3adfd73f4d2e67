# SPDX-License-Identifier: Apache-2.0
"""Breaks every computation of the kernels and their launcher in turn; the table of edge cases must notice each time.

    python -m tools.mutants

A mutant has one operator or comparison exchanged. It runs in a process of its own, because wrong addresses crash.
Mutants that cannot change any output are listed in EQUIVALENT with the reason.
"""

import ast
import copy
import importlib.util
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has asked for GPUs cannot be forked

import torch
from tqdm import tqdm

from heapr_vllm.model_executor.kernels.triton import a8_launch, launch
from tests.model_executor.kernels import a8_cases, moe_cases

SECONDS = 60
PACKAGE = "heapr_vllm.model_executor.kernels"
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
}
LAUNCHED = ("ragged_up_kernel", "ragged_down_kernel", "combine_kernel")
HELPERS = ("_place", "_tile", "_block", "_decode", "_scale_ptrs", "_step_scale", "_add_product", "_scale_sum")
HELPERS_IN_4_BITS = ("_places", "_plane", "_scaled_plane")
KERNELS = (*HELPERS, *HELPERS_IN_4_BITS, *LAUNCHED)
A8_LAUNCHED = ("round_rows_kernel", "a8_up_kernel", "a8_down_kernel")
A8_KERNELS = ("_rounded", "_product", "_scale", *A8_LAUNCHED)
A8_LAUNCHER = ("pack", "slab_scales", "inputs", "empty_hidden", "up_projection", "down_projection")
ROUTE_BLOCKS = ("align_routes", "max_blocks", "build")
LAUNCHER = (
    "pack",
    "_interleave",
    "_make_slabs",
    "_make_words",
    "_words",
    "_moved_as",
    "index_tables",
    "up_projection",
    "down_projection",
    "combine",
    "triton_ragged_moe",
    "group_size",
    "_weights",
)
EQUIVALENT = {
    "ragged_up_kernel: pid_n * BLOCK_N >= width  ->  pid_n * BLOCK_N > width": "an idle tile, masked at the store",
    "ragged_up_kernel: offs_n < width  ->  offs_n <= width": "reads one row too many, masked at the store",
    "ragged_up_kernel: offs_2n < 2 * width  ->  offs_2n <= 2 * width": "as above",
    "_block: first_row < total  ->  first_row <= total": "a block of padding more, masked at the stores",
    "index_tables: slot < layout.num_slots  ->  slot <= layout.num_slots": "vLLM's alignment notices",
    "align_routes: block_starts < ends[-1]  ->  block_starts <= ends[-1]": "an idle block, whose slot nobody uses",
    "build: len(table) - len(slot_map)  ->  len(table) + len(slot_map)": "more idle blocks: test_blocks_are_not_wasted",
    "_decode: (bits << 4 & -30736).to(tl.bfloat16, bitcast=True) * BF16_OVER_E4M3  ->  "
    "(bits << 4 & -30736).to(tl.bfloat16, bitcast=True) + BF16_OVER_E4M3": "the interpreter has no right bf16",
    "_decode: bits << 4  ->  bits >> 4": "as above: test_bits_of_e4m3_in_bf16",
    "ragged_up_kernel: BLOCK_M < 64  ->  BLOCK_M <= 64": "both ways are right: what registers allow",
    "_plane: 4 * PLACE  ->  4 + PLACE": "the interpreter has no such instructions: test_bits_of_4_bits_in_bf16",
    "_scaled_plane: dtype == tl.bfloat16  ->  dtype != tl.bfloat16": "the same in fp32",
    "_scaled_plane: _plane(words, PLACE, dtype) * scale.to(dtype)  ->  _plane(words, PLACE, dtype) + scale.to(dtype)": (
        "the interpreter has no right bf16"
    ),
    "_step_scale: H - GROUP  ->  H + GROUP": "what is loaded for a step after the last one is not used",
    "_weights: config.decode == 'bits'  ->  config.decode != 'bits'": "both are exact: test_decodes_are_as_chosen",
    "_product: a.dtype == tl.int8  ->  a.dtype != tl.int8": "the interpreter multiplies anything; it does not compile",
    "_product: a.shape[0] < 64  ->  a.shape[0] <= 64": "both orders are right: test_compile.py looks for wgmma",
    "a8_up_kernel: pid_n >= slabs  ->  pid_n > slabs": "a tile whose output nobody reads",
    "a8_up_kernel: H - BLOCK_K  ->  H + BLOCK_K": "as of _step_scale",
    "a8_down_kernel: slabs - 1  ->  slabs + 1": "as of _step_scale",
    "empty_hidden: experts.max_width // TRITON_UNIT  ->  experts.max_width * TRITON_UNIT": "more room than is used",
    "inputs: hidden_size // group  ->  hidden_size * group": "as above",
}  # each stands for one place: where the same expression occurs twice, later places are numbered


class Mutant(NamedTuple):
    """`name`: function, original expression and operator put in; `source`: of the whole module."""

    module: str
    name: str
    source: str


def mutants(module: str, functions: tuple[str, ...]) -> Iterator[Mutant]:
    """One mutant per operator inside `functions` of a module of `PACKAGE`. Raises LookupError if one is not there."""
    tree = ast.parse(Path(str(sys.modules[f"{PACKAGE}.{module}"].__file__)).read_text())
    listed = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in functions]
    if absent := set(functions) - {function.name for function in listed}:
        raise LookupError(f"{module}.py has no {', '.join(sorted(absent))}; correct the lists of tools/mutants.py")
    places: Counter[str] = Counter()
    for function in listed:
        for node in chain.from_iterable(map(ast.walk, function.body)):
            if not isinstance(node, ast.BinOp | ast.AugAssign | ast.Compare):
                continue
            field = "ops" if isinstance(node, ast.Compare) else "op"
            operators = node.ops if isinstance(node, ast.Compare) else [node.op]
            if len(operators) != 1 or type(operators[0]) not in SWAPS:
                continue
            before = ast.unparse(node)
            saved = copy.copy(operators)
            changed = SWAPS[type(operators[0])]()
            setattr(node, field, changed if field == "op" else [changed])
            name = f"{function.name}: {before}  ->  {ast.unparse(node)}"
            places[name] += 1
            number = f" #{places[name]}" if places[name] > 1 else ""
            yield Mutant(module, name + number, ast.unparse(tree))
            setattr(node, field, saved[0] if field == "op" else saved)


def load(mutant: Mutant, folder: str) -> None:
    """Puts the mutant's functions in place of the real ones."""
    path = Path(folder) / f"{mutant.module}.py"
    path.write_text(mutant.source)
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{mutant.module}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if mutant.module == "triton.jit":
        for kernel in LAUNCHED:
            setattr(launch, kernel, getattr(module, kernel))
    elif mutant.module == "triton.a8_jit":
        for kernel in A8_LAUNCHED:
            setattr(a8_launch, kernel, getattr(module, kernel))
    elif mutant.module == "slabs":
        a8_launch.round_by_slabs = module.round_by_slabs
    elif mutant.module == "triton.a8_launch":
        a8_cases.A8 = module.A8
    elif mutant.module == "triton.route_blocks":
        launch.RouteBlocks = module.RouteBlocks
    else:
        for name in ("triton_ragged_moe", "pack", "index_tables"):
            setattr(moe_cases, name, getattr(module, name))


def survives(mutant: Mutant) -> bool:
    """Whether every edge case still passes."""
    process = multiprocessing.get_context("fork").Process(target=_check, args=(mutant,))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode == 0


def _check(mutant: Mutant) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with tempfile.TemporaryDirectory() as folder:
        load(mutant, folder)
        if sys.modules[f"{PACKAGE}.triton.route_blocks"].max_blocks(40, 8, 16) != 10:
            os._exit(1)  # more would only cost time
        if mutant.module == "slabs" or mutant.module.startswith("triton.a8"):
            cases, build, limit = a8_cases.FEW_A8_CASES, a8_cases.build, max(a8_cases.LIMIT.values())
        else:
            cases = (*moe_cases.CASES, *moe_cases.FEW_IN_8_BITS, *moe_cases.FEW_IN_4_BITS)
            build, limit = moe_cases.build, moe_cases.TOLERANCE[torch.float32]
        for case in cases:
            layer = build(case, torch.float32)
            with moe_cases.fenced_scratch():
                output = layer.run(case.config)
            if layer.error(output) > limit or not moe_cases.is_fenced(output):
                os._exit(1)
    os._exit(0)


def main() -> int:
    torch.set_num_threads(1)
    for module in (launch, a8_launch):
        name = module.__name__.removeprefix(f"{PACKAGE}.")
        if not survives(Mutant(name, "control", Path(str(module.__file__)).read_text())):
            raise RuntimeError("the kernels fail without any mutation; run pytest tests/model_executor/kernels/triton")
    found = [
        *mutants("triton.jit", KERNELS),
        *mutants("triton.route_blocks", ROUTE_BLOCKS),
        *mutants("triton.launch", LAUNCHER),
        *mutants("triton.a8_jit", A8_KERNELS),
        *mutants("triton.a8_launch", A8_LAUNCHER),
        *mutants("slabs", ("round_by_slabs",)),
    ]
    survivors = [mutant.name for mutant in tqdm(found, unit="mutant", disable=None) if survives(mutant)]
    unexpected = [name for name in survivors if name not in EQUIVALENT]
    stale = EQUIVALENT.keys() - set(survivors)
    print(f"{len(found)} mutants, {len(found) - len(survivors)} noticed, {len(survivors) - len(unexpected)} equivalent")
    for name in unexpected:
        print(f"not noticed: {name}")
    for name in stale:
        print(f"noticed or gone, but listed as equivalent: {name}")
    return 1 if unexpected or stale else 0


if __name__ == "__main__":
    sys.exit(main())
