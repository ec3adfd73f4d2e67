# SPDX-License-Identifier: Apache-2.0
"""Calibration text: a dataset spec to equal blocks of token ids."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from heapr_vllm.checkpoint import Checkpoint
from heapr_vllm.errors import HeaprError, first_line

POOL_FACTOR = 8  # blocks are drawn from a pool this many times larger, so that they come from many documents
PASSAGE_CHARACTERS = 20_000
_SPEC = re.compile(r"(?P<name>[^\[\](){}]+)(\[(?P<subset>[^\]]+)\])?(\((?P<split>[^)]+)\))?")


def read_documents(spec: str) -> list[str]:
    """Documents of `file.txt` (one), `file.jsonl` (field `text`), or `name[subset](split)` through `datasets`.

    Raises HeaprError if the spec names nothing readable or there is no text.
    """
    path = Path(spec)
    if path.suffix in (".txt", ".jsonl"):
        if not path.is_file():
            raise HeaprError(f"dataset file {spec} does not exist")
        documents = [path.read_text(encoding="utf-8")] if path.suffix == ".txt" else list(_read_jsonl(path))
    else:
        documents = _read_hub_dataset(spec)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise HeaprError(f"dataset {spec} holds no text")
    return documents


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise HeaprError(f"{path}:{number} is not a JSON object with a `text` field") from error
            if not isinstance(text, str):
                raise HeaprError(f"{path}:{number} has a `text` field that is no string")
            yield text


def _read_hub_dataset(spec: str) -> list[str]:
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise HeaprError(f"dataset spec {spec!r} is not file.txt, file.jsonl or name[subset](split)")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise HeaprError(f"dataset {spec} needs the `datasets` package: pip install heapr-vllm[prune], "
                         "or pass a .txt or .jsonl file") from error
    try:
        rows = load_dataset(match["name"], match["subset"], split=match["split"] or "train")
    except (FileNotFoundError, ConnectionError, ValueError, OSError) as error:
        raise HeaprError(f"dataset {spec} cannot be loaded: {first_line(error)}") from error
    if "text" not in rows.column_names:
        raise HeaprError(f"dataset {spec} has no `text` column, only {', '.join(rows.column_names)}")
    return list(_passages(rows["text"]))


def _passages(rows: Iterable[str]) -> Iterator[str]:
    """Consecutive rows joined by blank lines into passages: rows of WikiText are single lines, not documents."""
    passage: list[str] = []
    for row in rows:
        passage.append(row)
        if sum(map(len, passage)) >= PASSAGE_CHARACTERS:
            yield "\n\n".join(passage)
            passage = []
    yield "\n\n".join(passage)


def token_blocks(documents: list[str], tokenizer: Any, num_samples: int, max_seq_length: int,
                 seed: int) -> torch.Tensor:
    """int64 [num_samples, max_seq_length]: a seeded sample of the documents joined by the end-of-text token.

    Documents are taken in random order until the pool is full (or they run out), then blocks are drawn at random.
    Raises HeaprError if there is too little text.
    """
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for index in torch.randperm(len(documents), generator=generator).tolist():
        ids += tokenizer(documents[index], add_special_tokens=False, verbose=False).input_ids
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= POOL_FACTOR * num_samples * max_seq_length:
            break
    available = len(ids) // max_seq_length
    if available < num_samples:
        raise HeaprError(f"the dataset has {available} blocks of {max_seq_length} tokens, {num_samples} are needed; "
                         "ask for fewer, lower --max-seq-length, or give more text")
    blocks = torch.tensor(ids[: available * max_seq_length]).view(available, max_seq_length)
    return blocks[torch.randperm(available, generator=generator)[:num_samples]]


def checkpoint_blocks(checkpoint: Checkpoint, spec: str, num_samples: int, max_seq_length: int,
                      seed: int) -> torch.Tensor:
    """`token_blocks` of the dataset `spec` for a checkpoint. Raises HeaprError if it has too few positions."""
    text = checkpoint.config.get("text_config", checkpoint.config)
    limit = text.get("max_position_embeddings", max_seq_length)
    if max_seq_length > limit:
        raise HeaprError(f"--max-seq-length {max_seq_length} exceeds the model's {limit} positions; "
                         f"pass --max-seq-length {limit}")
    return token_blocks(read_documents(spec), AutoTokenizer.from_pretrained(checkpoint.path), num_samples,
                        max_seq_length, seed)


def fingerprint(blocks: torch.Tensor) -> str:
    """sha256 of the token ids."""
    return f"sha256:{hashlib.sha256(blocks.numpy().tobytes()).hexdigest()}"
