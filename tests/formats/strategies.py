# SPDX-License-Identifier: Apache-2.0
"""Hostile versions of valid files: what a JSON document becomes when one or two of its values do."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

DEEP = "[" * 100_000  # JSON that no parser should recurse into
NUMBERS = (0, 1, -1, 7, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**400, 0.5, -0.5, 1e308)
TEXTS = ("", "1", "x", "/etc/passwd", "../../x", "heapr/../../x", "\x00", "\ud800", "é" * 300)
HOLDERS = ([], [[]], [0], [-1], ["x"], {}, {"": {}}, {"x": []}, {"model.layers.0.mlp.experts": [10**30]})
KEYS = ("text_config", "quantization_config", "compression_config", "inner", "experts", "config_groups", "masks")
HOSTILE = st.sampled_from([None, True, False, *NUMBERS, *TEXTS, *HOLDERS])

Place = tuple[str | int, ...]

REPAIR = {
    "method": "least-squares",
    "dataset": "text.txt",
    "dataset_fingerprint": "sha256:0",
    "num_samples": 4,
    "max_seq_length": 64,
    "seed": 0,
    "tokens": 256,
    "prior": 32.0,
    "experts": 3,
    "experts_with_few_tokens": 1,
    "output_error_removed": 0.5,
}


def paths(value: Any, here: Place = ()) -> Iterator[Place]:
    """Yields the place of every value in a document, the document first."""
    yield here
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from paths(entry, (*here, key))


def at(document: Any, path: Place) -> Any:
    """Returns the value at a place."""
    for key in path:
        document = document[key]
    return document


def changed(document: Any, path: Place, value: Any) -> Any:
    """The document with another value at a place; DELETED removes it."""
    if not path:
        return value
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if value is DELETED:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return document


DELETED = object()


@st.composite
def documents(draw: st.DrawFn, valid: Any) -> str:
    """Text of a JSON document: the valid one, with one or two values changed, removed, or the text itself damaged."""
    document = valid
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(paths(document))))
        if isinstance(at(document, path), dict) and draw(st.booleans()):
            document = changed(document, (*path, draw(st.sampled_from(KEYS))), draw(HOSTILE))
            continue
        value = draw(st.one_of(HOSTILE, st.just(DELETED))) if path else draw(HOSTILE)
        document = changed(document, path, value)
    text = json.dumps(document)
    kind = draw(st.sampled_from(["as it is"] * 8 + ["cut", "NaN", "deep", "bytes"]))
    if kind == "cut":
        return text[: draw(st.integers(0, len(text)))]
    if kind == "NaN":
        return text.replace("0", "NaN", 1)
    if kind == "deep":
        return DEEP
    return text + "\x00" if kind == "bytes" else text


def with_metadata(
    source: Path, text: str, target: Path, edit: Callable[[dict], dict] = lambda tensors: tensors
) -> None:
    """A safetensors file of ours with another header entry and other tensors."""
    with safe_open(source, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with suppress(UnicodeEncodeError):
        save_file(edit(tensors), target, metadata={"heapr": text})


def metadata(source: Path) -> Any:
    with safe_open(source, framework="pt") as file:
        return json.loads(file.metadata()["heapr"])
