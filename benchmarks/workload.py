# SPDX-License-Identifier: Apache-2.0
"""Workload of a served benchmark: random prompts, and the output tokens/s of a server that answers them."""

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer

from heapr_vllm.formats.checkpoint import Checkpoint

WARM_UP_TOKENS = 8
ANSWER_SECONDS = 1800


class Workload(NamedTuple):
    """Tokens in, tokens out, requests in flight and in total."""

    input_len: int
    output_len: int
    concurrency: int
    num_prompts: int


WORKLOADS = {
    "decode": Workload(128, 1024, 64, 64),
    "prefill": Workload(4096, 8, 32, 64),
    "mixed": Workload(1024, 128, 64, 128),
    "single": Workload(32, 256, 1, 2),
    "batch": Workload(32, 128, 16, 32),
    "chat": Workload(64, 256, 8, 32),
    "smoke": Workload(8, 8, 2, 4),
}


@cache
def vocabulary(model: Path) -> int:
    """How many token ids both the tokenizer and the model know."""
    config = Checkpoint(model).config
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer is not None
    return min(len(tokenizer), config.get("text_config", config)["vocab_size"])


def random_prompts(workload: Workload, vocabulary: int, seed: int) -> list[list[int]]:
    """Uniformly random ids [num_prompts][input_len]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (workload.num_prompts, workload.input_len), generator=generator).tolist()


def tokens_per_second(url: str, model: Path, workload: Workload, vocabulary: int, seed: int) -> float:
    """Output tokens/s over all of `workload`, after a short warm-up with other prompts.

    Raises RuntimeError if a request fails or stops early.
    """

    def ask(prompt: list[int], length: int = workload.output_len) -> None:
        complete(url, model, prompt, length)

    pool = ThreadPoolExecutor(workload.concurrency)
    try:
        warm_up = random_prompts(workload, vocabulary, seed + 1_000_000)[: workload.concurrency]
        list(pool.map(ask, warm_up, [min(WARM_UP_TOKENS, workload.output_len)] * len(warm_up)))
        started = time.perf_counter()
        list(pool.map(ask, random_prompts(workload, vocabulary, seed)))
        return workload.num_prompts * workload.output_len / (time.perf_counter() - started)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # what is still on its way ends with its server


def complete(url: str, model: Path, prompt: list[int], length: int) -> None:
    """One request of exactly `length` output tokens, sampled at temperature 1."""
    body = {"model": str(model), "prompt": prompt, "max_tokens": length, "ignore_eos": True, "temperature": 1.0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
            tokens = json.load(response)["usage"]["completion_tokens"]
    except OSError as error:
        reason = error.read().decode() if isinstance(error, urllib.error.HTTPError) else error
        raise RuntimeError(f"{url} did not answer a request for {model}: {reason}") from error
    if tokens != length:
        raise RuntimeError(f"{url} gave {tokens} tokens instead of {length}")
