# SPDX-License-Identifier: Apache-2.0
"""Calibration text: a dataset spec to equal samples of token ids."""

import hashlib
from typing import Any

import torch
from transformers import AutoTokenizer

from heapr_vllm.errors import HeaprError, first_line
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune.text.documents import read_documents

POOL_FACTOR = 8  # samples are drawn from a pool this many times larger, so that they come from many documents


def token_samples(
    documents: list[str], tokenizer: Any, num_samples: int, max_seq_length: int, seed: int
) -> torch.Tensor:
    """Draws int64 [num_samples, max_seq_length], seeded, from the documents joined by the end-of-text token.

    Documents are taken in random order until the pool is full (or they run out), then samples are drawn at random.
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
        raise HeaprError(
            f"the dataset has {available} samples of {max_seq_length} tokens, {num_samples} are needed; "
            "ask for fewer, lower --max-seq-length, or give more text"
        )
    samples = torch.tensor(ids[: available * max_seq_length]).view(available, max_seq_length)
    return samples[torch.randperm(available, generator=generator)[:num_samples]]


def checkpoint_samples(
    checkpoint: Checkpoint, spec: str, num_samples: int, max_seq_length: int, seed: int
) -> torch.Tensor:
    """Draws `token_samples` of the dataset `spec` for a checkpoint. Raises HeaprError if it has too few positions."""
    limit = checkpoint.text.max_position_embeddings or max_seq_length
    if max_seq_length < 2:
        raise HeaprError("--max-seq-length 1 leaves nothing to predict; pass 2 or more, better hundreds")
    if max_seq_length > limit:
        raise HeaprError(
            f"--max-seq-length {max_seq_length} exceeds the model's {limit} positions; pass --max-seq-length {limit}"
        )
    return token_samples(read_documents(spec), load_tokenizer(checkpoint), num_samples, max_seq_length, seed)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Loads the checkpoint's tokenizer, never code of its own. Raises HeaprError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise HeaprError(
            f"{checkpoint.path} holds no tokenizer that transformers loads ({first_line(error)}); code of a checkpoint "
            "is never run, so it needs one of the standard kind"
        ) from error


def fingerprint(samples: torch.Tensor) -> str:
    """Computes sha256 of the token ids."""
    return f"sha256:{hashlib.sha256(samples.numpy().tobytes()).hexdigest()}"
