# SPDX-License-Identifier: Apache-2.0
"""A text corpus every Python environment already has: the sources of the standard library and of a few packages.

    python serving_examples/python_corpus.py -o build/corpus

writes `train.jsonl`, `calibration.jsonl` and `held_out.jsonl`, one `{"path", "text"}` object per source file. Files
are split, never lines; files that share a third of their distinct lines are kept on one side, so that the held-out
text is not a near copy of training text. The split depends on file names only, hence a file stays on its side when a
package is upgraded.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import sysconfig
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path

PACKAGES = (
    "accelerate",
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "networkx",
    "numpy",
    "pandas",
    "sympy",
    "torch",
    "transformers",
    "vllm",
)
SPLITS = ("train", "calibration", "held_out")
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "third_party", "_vendor", "pgen2"}
MIN_BYTES, MAX_BYTES = 500, 200_000
SKETCH_SIZE = 96


def source_roots() -> dict[str, Path]:
    """Name and folder of every source, the standard library first; packages that are not installed are left out."""
    roots = {"stdlib": Path(sysconfig.get_path("stdlib"))}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            roots[name] = Path(spec.origin).parent
    return roots


def licences() -> dict[str, str]:
    """Licence of every source, as its own metadata states it."""
    found = {"stdlib": "PSF-2.0"}
    for name in source_roots().keys() - {"stdlib"}:
        dist = importlib.metadata.packages_distributions().get(name, [name])[0]
        meta = importlib.metadata.metadata(dist)
        classifiers = [c.split(" :: ")[-1] for c in meta.get_all("Classifier", []) if c.startswith("License")]
        texts = [*meta.get_all("License-Expression", []), *classifiers, *meta.get_all("License", [])]
        found[name] = next(filter(None, texts), "unknown").splitlines()[0]
    return found


def read_sources() -> dict[str, str]:
    """Text of every source file by `package/relative/path.py`, in sorted order."""
    texts = {}
    for name, root in source_roots().items():
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            if SKIPPED_FOLDERS.isdisjoint(relative.parts) and MIN_BYTES <= path.stat().st_size <= MAX_BYTES:
                texts[f"{name}/{relative.as_posix()}"] = path.read_text(encoding="utf-8", errors="ignore")
    return dict(sorted(texts.items()))


def line_sketch(text: str) -> frozenset[int]:
    """The smallest hashes of the distinct non-trivial lines: a bottom-k sketch, comparable between files."""
    lines = {line.strip() for line in text.splitlines()}
    hashes = sorted(zlib.crc32(line.encode()) for line in lines if len(line) > 12)
    return frozenset(hashes[:SKETCH_SIZE])


def near_duplicate_groups(texts: dict[str, str]) -> Iterator[list[str]]:
    """Groups of files connected by sharing at least a third of the smaller sketch."""
    sketches = {path: line_sketch(text) for path, text in texts.items()}
    files_by_hash = defaultdict(list)
    for path, sketch in sketches.items():
        for value in sketch:
            files_by_hash[value].append(path)
    shared = Counter(
        pair for paths in files_by_hash.values() if 1 < len(paths) <= 60 for pair in combinations(paths, 2)
    )
    parent = {path: path for path in texts}

    def find(path: str) -> str:
        while parent[path] != path:
            parent[path] = parent[parent[path]]
            path = parent[path]
        return path

    for (a, b), count in shared.items():
        if 3 * count >= min(len(sketches[a]), len(sketches[b])):
            parent[max(find(a), find(b))] = min(find(a), find(b))
    groups = defaultdict(list)
    for path in texts:
        groups[find(path)].append(path)
    yield from groups.values()


def split_of(group: list[str]) -> str:
    """Ten percent of the small groups for calibration, ten percent held out; large families of copies train."""
    bucket = zlib.crc32(min(group).encode()) % 10
    return "train" if bucket > 1 or len(group) > 8 else SPLITS[1 + bucket]


def build() -> dict[str, dict[str, str]]:
    """The corpus as split -> path -> text."""
    texts = read_sources()
    splits: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    for group in near_duplicate_groups(texts):
        splits[split_of(group)].update({path: texts[path] for path in group})
    return {
        split: dict(sorted(files.items(), key=lambda item: zlib.crc32(item[0][::-1].encode())))
        for split, files in splits.items()
    }


def write_jsonl(path: Path, files: Iterable[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"path": name, "text": text}) + "\n" for name, text in files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    output = parser.parse_args().output
    print("sources and licences: " + ", ".join(f"{name} ({text})" for name, text in licences().items()))
    for split, files in build().items():
        write_jsonl(output / f"{split}.jsonl", files.items())
        print(f"{split}: {len(files)} files, {sum(map(len, files.values())) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
