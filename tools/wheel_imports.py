# SPDX-License-Identifier: Apache-2.0
"""Whether a vLLM wheel has what the plugin uses of it, read from its source, without importing it or having a GPU.

    pip download --no-deps vllm==0.33.0
    python -m tools.wheel_imports vllm-0.33.0-*.whl

Checked: every imported name; every call of a vLLM function, class or method against its parameters; every attribute of
an object whose class the annotations tell; abstract and overridden methods of the plugin's classes. WHEEL may also be a
site-packages folder.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from tools.definitions import Class, Function
from tools.sources import ROOT, Scope, Sources

OWN_ATTRIBUTES = {"w13_weight", "w2_weight", "heapr_slots", "heapr_table"}  # registered on vLLM's layer by the plugin


class Check(ast.NodeVisitor):
    """Walks one file of the plugin. `problems` are one-line descriptions, `count` says how many uses were looked up."""

    def __init__(self, sources: Sources, module: str) -> None:
        self.sources = sources
        self.scope = Scope(sources, module)
        self.problems: list[str] = []
        self.count = 0

    def expect(self, is_fine: bool, node: ast.AST, message: str) -> None:
        self.count += 1
        if not is_fine:
            self.problems.append(f"{self.scope.module}:{node.lineno}: {message}")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if (node.module or "").split(".")[0] == "vllm":
                self.expect(
                    self.sources.find(node.module, alias.name) is not None, node, f"{node.module} has no {alias.name}"
                )
        self.scope.bind(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == "vllm":
                self.expect(self.sources.tree(alias.name) is not None, node, f"no module {alias.name}")
        self.scope.bind(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        own = Class(self.scope.module, node)
        bases = [base for base in self.sources.ancestors(own)[1:] if base.module.split(".")[0] == "vllm"]
        for name in sorted({name for base in bases for name in base.abstract()}):
            owner = next(c for c in self.sources.ancestors(own) if name in c.methods())
            self.expect(name not in owner.abstract(), node, f"{node.name} lacks {name}, abstract in {owner.node.name}")
        for name, method in own.methods().items():
            base = next((base for base in bases if name in base.methods()), None)
            if base is not None and name != "__init__":
                wrong = Function(base.methods()[name]).not_taken_by(Function(method))
                self.expect(not wrong, method, f"{base.node.name}.{name} {wrong}")
        with self.scope.inside(own):
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        with self.scope.inside(node):
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        self.scope.assign(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        owner = self.scope.type_of(node.value)
        if isinstance(owner, str) and owner.split(".")[0] == "vllm":
            self.expect(self.sources.find(owner, node.attr) is not None, node, f"{owner} has no {node.attr}")
        if (
            isinstance(owner, Class)
            and isinstance(node.ctx, ast.Load)
            and node.attr not in OWN_ATTRIBUTES
            and any(c.module.split(".")[0] == "vllm" for c in self.sources.ancestors(owner))
        ):
            self.expect(self.sources.has(owner, node.attr), node, f"{owner.node.name} has no {node.attr}")

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        called = self.scope.function_of(node.func)
        if called is not None and not any(isinstance(a, ast.Starred) for a in node.args):
            wrong = called.rejects(len(node.args), [keyword.arg for keyword in node.keywords])
            self.expect(not wrong, node, f"{ast.unparse(node.func)} {wrong}")


def check(sources: Sources) -> tuple[int, list[str]]:
    """Number of uses looked up in all files of the plugin, and what is wrong with them."""
    count, problems = 0, []
    for path in sorted((ROOT / "heapr_vllm").rglob("*.py")):
        visitor = Check(sources, ".".join(path.relative_to(ROOT).with_suffix("").parts))
        visitor.visit(ast.parse(path.read_text()))
        count += visitor.count
        problems += visitor.problems
    return count, problems


def main() -> int:
    status = 0
    for wheel in map(Path, sys.argv[1:]):
        count, problems = check(Sources(wheel))
        print("\n".join([*problems, f"{wheel.name}: {count} uses, {len(problems)} problems"]))
        status |= bool(problems) or not count
    return status


if __name__ == "__main__":
    sys.exit(main())
