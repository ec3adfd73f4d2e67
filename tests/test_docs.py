# SPDX-License-Identifier: Apache-2.0
"""Texts keep what they promise: links, targets, commands, variables and the way to install."""

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from heapr_vllm import environment
from heapr_vllm.environment import install_command

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "serving_examples").rglob("README.md"))
SOURCES = [path for folder in ("heapr_vllm", "benchmarks", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
EXAMPLES = [path for path in sorted((ROOT / "serving_examples").rglob("*")) if path.suffix in (".py", ".yaml", "")]
MACROS = {"HEAPR_AMX"}  # of the C++ op
DATED = {"measurements.md", "CHANGELOG.md"}  # logs: past entries name what there was


def words(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


@cache
def makefile() -> str:
    return (ROOT / "Makefile").read_text()


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
class TestPages:
    def test_relative_links_resolve(self, page: Path) -> None:
        prose = re.sub(r"```.*?```|^    .*$|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            if link.startswith(("http://", "https://")):
                continue
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link

    def test_make_targets_exist(self, page: Path) -> None:
        text = page.read_text()
        targets = set(re.findall(r"`[^`\n]*\bmake ([a-z-]+)", text))
        targets |= set(re.findall(r"^    make ([a-z-]+)", text, re.MULTILINE))
        for target in targets:
            assert re.search(rf"^{target}:", makefile(), re.MULTILINE), target

    def test_modules_that_are_run_exist(self, page: Path) -> None:
        for module in re.findall(r"-m ((?:benchmarks|tools|serving_examples)[.\w]*)", page.read_text()):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module

    def test_files_that_are_named_exist(self, page: Path) -> None:
        """Paths from the root, or from `heapr_vllm`, in backticks."""
        if page.name in DATED:
            return
        for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|csv|cpp|md))`", page.read_text()):
            rooms = (ROOT, ROOT / "heapr_vllm", ROOT / "heapr_vllm" / "model_executor")
            assert any((room / path).exists() for room in rooms), path


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("source", ["", "git+https://example.org/heapr_vllm"])
def test_install_command(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "SOURCE", source)
    target = f'"heapr-vllm[vllm,prune] @ {source}"' if source else '".[vllm,prune]"  # in a checkout of heapr-vllm'
    assert install_command("vllm", "prune") == f"pip install {target}"


def test_one_way_to_install() -> None:
    """What texts say is what `install_command` says; nothing pretends that an index has the package."""
    command = install_command("vllm", "prune").split("  #")[0]
    assert f"    {command}\n" in (ROOT / "README.md").read_text()
    assert command in makefile()
    for path in (*PAGES, *SOURCES, *EXAMPLES, ROOT / "Makefile"):
        wrong = re.findall(r"pip install \"?heapr[-_]vllm[^@\n]*$", words(path), re.MULTILINE)
        assert not wrong, f"{path.relative_to(ROOT)}: {wrong}"
    assert not re.search(r"packages: .*\bheapr-vllm\b", words(ROOT / "serving_examples" / "ray_serve" / "heapr.yaml"))


def test_every_variable_is_in_the_table() -> None:
    table = set(re.findall(r"^\| `(HEAPR_[A-Z_]+)` \|", (ROOT / "docs/supported.md").read_text(), re.MULTILINE))
    read = set()
    for path in (*SOURCES, ROOT / "setup.py", *(ROOT / "tests").rglob("*.py")):
        read |= set(re.findall(r"\"(HEAPR_[A-Z_]+)\"", words(path)))
    assert read - MACROS <= table
    named = {name for page in PAGES for name in re.findall(r"HEAPR_[A-Z_]+", page.read_text())}
    assert named - MACROS - {"HEAPR_"} <= table


def test_pre_commit_runs_what_make_lint_runs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile(), re.MULTILINE)[1]
    assert set(re.findall(r"\$\(BIN\)/(.+)", recipe)) <= hooks
