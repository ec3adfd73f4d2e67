# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and the one window of supported vLLM versions."""

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from heapr_vllm.environment import SUPPORTED_VLLM, is_supported
from heapr_vllm.model_executor.compat import warn_if_unsupported

ROOT = Path(__file__).parent.parent


PACKAGE = ROOT / "heapr_vllm"
LAYERS = {  # what stands on what: an import goes to a lower number, or stays inside its own room
    "heapr_vllm.__main__": 4,
    "heapr_vllm.cli": 3,
    "heapr_vllm.evaluation": 2,
    "heapr_vllm.prune": 1,
    "heapr_vllm.model_executor": 1,
    "heapr_vllm.formats": 0,
    "heapr_vllm.errors": -1,
    "heapr_vllm.environment": -1,
    "heapr_vllm": -2,
}
USES_VLLM = ("heapr_vllm.model_executor.", "heapr_vllm.evaluation.served")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str) -> set[str]:
    """Modules that a module imports, inside functions too, but not for annotations only."""
    tree = ast.parse(MODULES[module].read_text())
    skipped: set[ast.AST] = set()
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(node.body)
        if isinstance(node, ast.Import) and node not in skipped:
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node not in skipped:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found.update(name if name in MODULES else node.module for name in names)
    return found


def room(module: str) -> str:
    """The longest entry of LAYERS that a module lies in."""
    return max((name for name in LAYERS if f"{module}.".startswith(f"{name}.")), key=len)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"heapr_vllm"}))  # whose register() is vLLM's way in
def test_nothing_runs_back_up(module: str) -> None:
    for imported in imports_of(module) & MODULES.keys():
        is_inside = room(imported) == room(module)
        assert is_inside or LAYERS[room(imported)] < LAYERS[room(module)], f"{module} imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_only_the_plugin_imports_vllm(module: str) -> None:
    if not module.startswith(USES_VLLM):
        assert not {name for name in imports_of(module) if name.split(".")[0] == "vllm"}


def test_no_circles() -> None:
    """Neither between modules nor between the rooms inside `prune` and `model_executor`."""
    modules = {module: imports_of(module) & MODULES.keys() - {"heapr_vllm.prune"} for module in MODULES}
    TopologicalSorter(modules).prepare()  # raises CycleError
    rooms: dict[str, set[str]] = {}
    for module, imported in modules.items():
        here = module.split(".")[:-1][:3]
        for other in imported:
            there = other.split(".")[:-1][:3]
            if len(here) == len(there) == 3 and here != there:
                rooms.setdefault(".".join(here), set()).add(".".join(there))
    TopologicalSorter(rooms).prepare()


def test_importing_the_package_is_light() -> None:
    code = "import sys, heapr_vllm, heapr_vllm.cli.main; print('torch' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_window_is_stated_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["vllm"] == [f"vllm{SUPPORTED_VLLM}"]
    assert f"`vllm{SUPPORTED_VLLM}`" in (ROOT / "README.md").read_text()


def test_versions_outside_the_window_warn() -> None:
    assert is_supported("0.26.0") and is_supported("0.32.0+cpu") and is_supported("0.33.1")
    assert not is_supported("0.25.1") and not is_supported("0.34.0")
    with pytest.warns(UserWarning, match=r"tested with vllm>=0.26,<0.34, this is 0.40.0.* pip install"):
        warn_if_unsupported("0.40.0")
