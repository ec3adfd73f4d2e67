# SPDX-License-Identifier: Apache-2.0
"""Functions and classes as syntax trees: which calls and overrides fit them, which attributes they have."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """A definition of a function or method."""

    node: FunctionNode

    def names(self) -> list[str]:
        """Positional parameters that a caller may give, `self` and `cls` left out."""
        arguments = [a.arg for a in self.node.args.posonlyargs + self.node.args.args]
        return arguments[1:] if arguments[:1] in (["self"], ["cls"]) else arguments

    def rejects(self, positional: int, keywords: list[str | None]) -> str:
        """Why a call with so many positional arguments and these keywords (None for **) fails; "" if it does not."""
        arguments, names = self.node.args, self.names()
        optional = names[len(names) - len(arguments.defaults) :] if arguments.defaults else []
        allowed = {*names, *(a.arg for a in arguments.kwonlyargs)}
        required = {*names} - {*optional} | {
            a.arg for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None
        }
        if positional > len(names) and not arguments.vararg:
            return f"takes {len(names)} positional arguments"
        if unknown := {k for k in keywords if k} - allowed if not arguments.kwarg else set():
            return f"has no parameter {', '.join(sorted(unknown))}"
        if None not in keywords and (missing := required - {*names[:positional]} - {*keywords}):
            return f"needs {', '.join(sorted(missing))}"
        return ""

    def not_taken_by(self, override: Function) -> str:
        """What callers of this method may pass that `override` does not take, or lacks; "" if nothing."""
        mine, theirs, arguments = self.names(), override.names(), override.node.args
        mine += [a.arg for a in self.node.args.kwonlyargs]
        theirs += [a.arg for a in arguments.kwonlyargs]
        if not arguments.kwarg and (extra := [name for name in mine if name not in theirs]):
            return f"is also given {', '.join(extra)}"
        if [name for name in theirs if name in mine] != [name for name in mine if name in theirs]:
            return f"takes {', '.join(mine)} in this order"
        required = len(override.names()) - len(arguments.defaults)
        unknown = [name for name in override.names()[:required] if name not in mine]
        return f"is not given {', '.join(unknown)}" if unknown and not self.node.args.kwarg else ""


@dataclass(frozen=True)
class Class:
    """A class and the module it is defined in."""

    module: str
    node: ast.ClassDef

    @cache  # noqa: B019
    def methods(self) -> dict[str, FunctionNode]:
        return {item.name: item for item in self.node.body if isinstance(item, FunctionNode)}

    def abstract(self) -> set[str]:
        return {
            name
            for name, node in self.methods().items()
            if any("abstractmethod" in ast.unparse(d) for d in node.decorator_list)
        }

    @cache  # noqa: B019
    def members(self) -> dict[str, ast.expr | FunctionNode | None]:
        """Attributes by name: a method, or the annotation if there is one."""
        found: dict[str, ast.expr | FunctionNode | None] = {}
        for item in ast.walk(self.node):
            targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
            flat = [t for target in targets for t in getattr(target, "elts", [target])]
            for target in flat:
                is_self = isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
                if is_self or (isinstance(target, ast.Name) and item in self.node.body):
                    name = target.attr if is_self else target.id
                    found[name] = getattr(item, "annotation", None) or found.get(name) or self._parameter(item)
        return found | self.methods()

    def _parameter(self, item: ast.stmt) -> ast.expr | None:
        """Annotation of the parameter of `__init__` that `self.x = parameter` stores."""
        init = self.methods().get("__init__")
        if init is None or not isinstance(value := getattr(item, "value", None), ast.Name):
            return None
        return next((a.annotation for a in init.args.args if a.arg == value.id), None)
