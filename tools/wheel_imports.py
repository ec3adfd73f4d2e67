# SPDX-License-Identifier: Apache-2.0
"""Whether a vLLM wheel has what the plugin uses of it, read from its source, without importing it or having a GPU.

    pip download --no-deps vllm==0.33.0
    python -m tools.wheel_imports vllm-0.33.0-*.whl

ty checks the plugin against the wheel: imported names, calls, attributes, abstract and overridden methods. WHEEL may
also be a site-packages folder. What vLLM imports in turn comes from this environment.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIAGNOSTIC = re.compile(r"\S+:\d+:\d+: \w+\[(?P<rule>.+?)\]")
IMPORT = re.compile(r"^\s*(from|import) vllm\b", re.MULTILINE)
OTHER_RULES = {  # about values, not names or signatures: versions differ in how closely vLLM annotates
    "deprecated",
    "invalid-explicit-return",
    "missing-union-attribute",
    "redundant-cast",
    "unused-ignore-comment",
}


def unpack(wheel: Path, folder: Path) -> None:
    """Writes vLLM's sources to `folder`, without its `__getattr__`s, by which ty would take any name to exist.

    Raises ValueError if `wheel`, a file or a site-packages folder, holds no vLLM.
    """
    if wheel.is_file():
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
            texts = {name: archive.read(name).decode() for name in names}
    else:
        texts = {str(path.relative_to(wheel)): path.read_text() for path in (wheel / "vllm").rglob("*.py")}
    if "vllm/__init__.py" not in texts:
        raise ValueError(f"{wheel} holds no vLLM")
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.replace("__getattr__", "_getattr"))


def check(folder: Path) -> list[str]:
    """What is wrong with the plugin beside the vLLM that `unpack` wrote to `folder`, one line each."""
    files = [path for path in sorted((ROOT / "heapr_vllm").rglob("*.py")) if IMPORT.search(path.read_text())]
    command = [sys.executable, "-m", "ty", "check", "--output-format", "concise", "--python", sys.prefix]
    found = subprocess.run(
        [*command, "--extra-search-path", folder, *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if found.returncode not in (0, 1):
        raise RuntimeError(found.stderr)
    lines = found.stdout.splitlines()
    return [line for line in lines if (match := DIAGNOSTIC.match(line)) and match["rule"] not in OTHER_RULES]


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    status = 0
    for wheel in map(Path, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            unpack(wheel, Path(folder))
            problems = check(Path(folder))
        print("\n".join([*problems, f"{wheel.name}: {len(problems)} problems"]))
        status |= bool(problems)
    return status


if __name__ == "__main__":
    sys.exit(main())
