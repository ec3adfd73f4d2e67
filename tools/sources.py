# SPDX-License-Identifier: Apache-2.0
"""Python sources as syntax trees: names followed through re-exports, classes through annotations."""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache, cached_property, reduce
from importlib import import_module
from pathlib import Path

from tools.definitions import Class, Function, FunctionNode

ROOT = Path(__file__).parent.parent


class Sources:
    """Modules of a vLLM wheel or site-packages folder, and those of this repository."""

    def __init__(self, vllm: Path) -> None:
        self.vllm = vllm
        self.wheel = zipfile.ZipFile(vllm) if vllm.is_file() else None

    @cached_property
    def wheel_names(self) -> set[str]:
        return set(self.wheel.namelist()) if self.wheel else set()

    def read(self, path: str) -> str | None:
        """Text of a file, None if there is none."""
        if self.wheel is not None and not path.startswith("heapr_vllm/"):
            return self.wheel.read(path).decode() if path in self.wheel_names else None
        file = (ROOT if path.startswith("heapr_vllm/") else self.vllm) / path
        return file.read_text() if file.is_file() else None

    @cache  # noqa: B019 - lives as long as the check
    def tree(self, module: str) -> ast.Module | None:
        """None if there is no such module."""
        for path in (module.replace(".", "/") + ".py", module.replace(".", "/") + "/__init__.py"):
            if (text := self.read(path)) is not None:
                return parse(text)
        return None

    @cache  # noqa: B019
    def names(self, module: str) -> dict[str, ast.AST | tuple[str, str]]:
        """What a module defines, by name: a statement, or (module, name) of an import. Definitions win."""
        tree, found = self.tree(module), {}
        is_package = self.is_package(module)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                source = absolute(module, node, is_package)
                found |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = node  # anywhere: modules with __getattr__ declare their names so
        for node in tree.body:
            if isinstance(node, ast.ClassDef | FunctionNode):
                found[node.name] = node
            elif isinstance(node, ast.Assign):
                found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        return found

    @cache  # noqa: B019
    def scope(self, module: str) -> Scope:
        """All imports of a module."""
        scope = Scope(self, module)
        for node in ast.walk(self.tree(module)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                scope.bind(node)
        return scope

    @cache  # noqa: B019
    def find(self, module: str, name: str) -> tuple[str, ast.AST] | str | None:
        """Where `name` of `module` is defined: (module, definition), a module's name, or None if nowhere."""
        if self.tree(module) is None:
            return None
        found = self.names(module).get(name)
        if isinstance(found, tuple) and found != (module, name):
            return self.find(*found)
        if isinstance(found, ast.AST):
            return module, found
        return f"{module}.{name}" if self.tree(f"{module}.{name}") is not None else None

    def has(self, cls: Class, name: str) -> bool:
        """Whether the class has this attribute, from a base in another library too."""
        for ancestor in self.ancestors(cls):
            if name in ancestor.members() or any(hasattr(base, name) for base in self._foreign_bases(ancestor)):
                return True
        return hasattr(object, name)

    def _foreign_bases(self, cls: Class) -> list[type]:
        """Bases from other libraries, such as torch.nn.Module: those are imported."""
        scope, found = self.scope(cls.module), []
        for base in map(ast.unparse, cls.node.bases):
            first, *rest = base.split(".")
            source = scope.imported.get(first) or ((scope.types[first], "") if first in scope.types else ("", ""))
            if source[0] and source[0].split(".")[0] not in ("vllm", "heapr_vllm"):
                value = import_module(source[0])
                found.append(reduce(getattr, [*filter(None, source[1:]), *rest], value))
        return found

    def is_package(self, module: str) -> bool:
        return self.tree(f"{module}.__init__") is not None

    @cache  # noqa: B019
    def ancestors(self, cls: Class) -> list[Class]:
        """`cls` and the bases whose sources are known, nearest first."""
        found = [cls]
        for base in cls.node.bases:
            if isinstance(resolved := self.scope(cls.module).annotated(base), Class):
                found += [c for c in self.ancestors(resolved) if c not in found]
        return found


@cache
def parse(text: str) -> ast.Module:
    return ast.parse(text)


def absolute(module: str, node: ast.ImportFrom, is_package: bool) -> str:
    """Full name of the module that `from ... import` names inside `module`."""
    if not node.level:
        return node.module or ""
    parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
    return ".".join([*parents, *([node.module] if node.module else [])])


class Scope:
    """What names stand for at one place: a module's name, a Class, or a Function."""

    def __init__(self, sources: Sources, module: str) -> None:
        self.sources = sources
        self.module = module
        self.types: dict[str, str | Class | None] = {}  # variables and imported modules
        self.imported: dict[str, tuple[str, str]] = {}

    def bind(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                source = absolute(self.module, node, self.sources.is_package(self.module))
                self.imported[alias.asname or alias.name] = (source, alias.name)
            else:
                self.types[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )

    @contextmanager
    def inside(self, item: Class | FunctionNode) -> Generator[None]:
        """`self`, or the parameters' annotated types."""
        before = dict(self.types)
        if isinstance(item, Class):
            self.types["self"] = item
        else:
            for argument in item.args.args + item.args.kwonlyargs:
                if argument.arg != "self":
                    self.types[argument.arg] = self.annotated(argument.annotation)
        yield
        self.types = before

    def assign(self, node: ast.Assign) -> None:
        targets, values = node.targets[0], node.value
        pairs = (
            zip(targets.elts, values.elts, strict=False)
            if (isinstance(targets, ast.Tuple) and isinstance(values, ast.Tuple))
            else [(targets, values)]
        )
        for target, value in pairs:
            if isinstance(target, ast.Name):
                self.types[target.id] = self.type_of(value)

    def named(self, name: str) -> tuple[str, ast.AST] | str | None:
        """Definition or module that a name stands for."""
        if name in self.imported:
            return self.sources.find(*self.imported[name])
        return self.sources.find(self.module, name)

    def definition(self, node: ast.expr) -> tuple[str, ast.AST] | str | None:
        if isinstance(node, ast.Name):
            return self.named(node.id)
        if isinstance(node, ast.Attribute) and isinstance(owner := self.type_of(node.value), str):
            return self.sources.find(owner, node.attr)
        return None

    def annotated(self, node: ast.expr | None) -> str | Class | None:
        """Class that an annotation names; the first one of a union."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self.annotated(ast.parse(node.value, mode="eval").body)
        if isinstance(node, ast.BinOp):
            return self.annotated(node.left) or self.annotated(node.right)
        found = self.definition(node) if isinstance(node, ast.Name | ast.Attribute) else None
        return Class(*found) if isinstance(found, tuple) and isinstance(found[1], ast.ClassDef) else None

    def type_of(self, node: ast.expr) -> str | Class | None:
        """Class of a value, or the name of a module; None if unknown."""
        if isinstance(node, ast.Name):
            if node.id in self.types:
                return self.types[node.id]
            found = self.named(node.id)
            return found if isinstance(found, str) else None
        if isinstance(node, ast.Attribute):
            owner = self.type_of(node.value)
            if isinstance(owner, str):
                found = self.sources.find(owner, node.attr)
                return found if isinstance(found, str) else None
            if isinstance(owner, Class):
                member, scope = self._member(owner, node.attr)
                return scope.annotated(member.returns if isinstance(member, FunctionNode) else member)
        if isinstance(node, ast.Call):
            found = self.definition(node.func)
            if isinstance(found, tuple) and isinstance(found[1], ast.ClassDef):
                return Class(*found)
            if isinstance(found, tuple) and isinstance(found[1], FunctionNode):
                return self.sources.scope(found[0]).annotated(found[1].returns)
        return None

    def _member(self, owner: Class, name: str) -> tuple[ast.expr | FunctionNode | None, Scope]:
        for cls in self.sources.ancestors(owner):
            if name in cls.members():
                return cls.members()[name], self.sources.scope(cls.module)
        return None, self

    def function_of(self, node: ast.expr) -> Function | None:
        """vLLM's function that a call of `node` runs, if it can be told: a function, a constructor or a method."""
        found = self.definition(node)
        if isinstance(found, tuple) and found[0].split(".")[0] == "vllm":
            if isinstance(found[1], FunctionNode):
                return Function(found[1])
            if isinstance(found[1], ast.ClassDef):
                init, scope = self._member(Class(*found), "__init__")
                return Function(init) if isinstance(init, FunctionNode) else None
        if isinstance(node, ast.Attribute):
            is_name = isinstance(node.value, ast.Name | ast.Attribute)
            owner = self.annotated(node.value) if is_name else None
            owner = owner or self.type_of(node.value)
            if isinstance(owner, Class):
                method, scope = self._member(owner, node.attr)
                if isinstance(method, FunctionNode) and scope.module.split(".")[0] == "vllm":
                    return Function(method)
        return None
