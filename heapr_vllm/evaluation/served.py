# SPDX-License-Identifier: Apache-2.0
"""Perplexity of what vLLM serves: `heapr eval --backend vllm`.

    python -m heapr_vllm.evaluation.served MODEL DTYPE SAMPLES

is one engine in a process of its own, so that the next model finds the device empty.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

from safetensors.torch import load_file, save_file

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune.text.samples import Samples

if TYPE_CHECKING:
    from vllm.config.model import ModelDType

MARKER = "PERPLEXITY "


def served_perplexity(checkpoint: Checkpoint, samples: Samples, dtype: str) -> float:
    """Measures exp of the mean next-token cross entropy over `samples`, each its own context.

    Masks repositories are served over their base model. Raises HeaprError if the engine does not come up, with the end
    of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "samples.safetensors"
        tensors = {f"ids.{number}": sample.ids.clone() for number, sample in enumerate(samples.entries)}
        counted = {f"counted.{number}": sample.counted.clone() for number, sample in enumerate(samples.entries)}
        save_file(tensors | counted, text)
        command = [sys.executable, "-m", "heapr_vllm.evaluation.served", str(checkpoint.path), dtype, str(text)]
        env = {"VLLM_LOGGING_LEVEL": "ERROR", **os.environ}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    answer = next((line for line in done.stdout.splitlines() if line.startswith(MARKER)), None)
    if answer is None:
        reason = [line for line in done.stderr.splitlines() if line.strip()]
        raise HeaprError(f"vLLM could not evaluate {checkpoint.path}: {reason[-1] if reason else 'no output'}")
    return json.loads(answer.removeprefix(MARKER))


def main(model: str, dtype: str, text: str) -> None:
    from vllm import LLM, SamplingParams

    tensors = load_file(text)
    samples = [tensors[f"ids.{number}"].tolist() for number in range(len(tensors) // 2)]
    load_format = "auto" if Checkpoint(Path(model)).has_weights else "heapr"
    llm = LLM(
        model,
        dtype=cast("ModelDType", dtype),
        load_format=load_format,
        max_model_len=max(map(len, samples)) + 1,
        enable_prefix_caching=False,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in samples], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    )
    total, count = 0.0, 0
    for number, (ids, output) in enumerate(zip(samples, outputs, strict=True)):
        assert output.prompt_logprobs is not None, "asked for above"
        for position in tensors[f"counted.{number}"][1:].nonzero().flatten().tolist():
            logprobs = output.prompt_logprobs[position + 1]
            assert logprobs is not None, "only the first token has none"
            total, count = total + logprobs[ids[position + 1]].logprob, count + 1
    print(MARKER + json.dumps(math.exp(-total / count)))


if __name__ == "__main__":
    main(*sys.argv[1:])
