# SPDX-License-Identifier: Apache-2.0
"""What vLLM serves, on text and on tasks: `heapr eval --backend vllm`.

    python -m heapr_vllm.evaluation.served REQUEST.json

is one engine in a process of its own, so that the next model finds the device empty.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from heapr_vllm.errors import HeaprError
from heapr_vllm.evaluation.predictions import Predictions, PredictionsFolder
from heapr_vllm.evaluation.settings import EvaluationSettings
from heapr_vllm.evaluation.tasks import Outcomes, run_tasks
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.schema import parse_json, read_json

if TYPE_CHECKING:
    from vllm import LLM

TEXT, ANSWER, REFUSAL = "samples.safetensors", "outcomes.json", "refusal.txt"
SAMPLES_AT_ONCE = 16  # so that little is lost by a kill, and little lies in memory


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the engine's process is asked for: `missing` samples of the text, into `predictions`, and the tasks."""

    model: str
    settings: EvaluationSettings
    missing: list[int]
    predictions: str
    answers: str | None


def run_served(
    checkpoint: Checkpoint,
    samples: torch.Tensor,
    missing: list[int],
    folder: PredictionsFolder,
    settings: EvaluationSettings,
    answers: Path | None,
) -> dict[str, Outcomes]:
    """Predicts the `missing` ones of `samples` int64 [N, L], each its own context, and runs the tasks.

    Masks repositories are served over their base model. Raises HeaprError if the engine does not come up, with the end
    of its output.
    """
    request = Request(
        model=str(checkpoint.path),
        settings=settings,
        missing=missing,
        predictions=str(folder.folder),
        answers=str(answers) if answers else None,
    )
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save_file({"samples": samples}, work / TEXT)
        (work / "request.json").write_text(json.dumps(asdict(request)))
        command = [sys.executable, "-m", "heapr_vllm.evaluation.served", str(work / "request.json")]
        env = {"VLLM_LOGGING_LEVEL": "ERROR", **os.environ}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if (work / REFUSAL).is_file():
            raise HeaprError((work / REFUSAL).read_text())
        if not (work / ANSWER).is_file():
            reason = [line for line in done.stderr.splitlines() if line.strip()]
            raise HeaprError(f"vLLM could not evaluate {checkpoint.path}: {reason[-1] if reason else 'no output'}")
        return read_json(work / ANSWER, dict[str, Outcomes], "evaluate again")


def main(path: str) -> None:
    work = Path(path).parent
    request = parse_json(Path(path).read_bytes(), Request, path, "evaluate again")
    try:
        outcomes = answer(request, load_file(work / TEXT)["samples"])
    except HeaprError as error:
        (work / REFUSAL).write_text(str(error))
        sys.exit(2)
    (work / ANSWER).write_text(json.dumps({task: asdict(each) for task, each in outcomes.items()}))


def answer(request: Request, samples: torch.Tensor) -> dict[str, Outcomes]:
    """Starts the engine and has it do what is asked for."""
    from vllm import LLM

    settings = request.settings
    arguments: dict[str, Any] = {
        "dtype": settings.dtype,
        "load_format": "auto" if Checkpoint(Path(request.model)).has_weights else "heapr",
        "max_logprobs": max(20, settings.top_k),
        "enable_prefix_caching": bool(settings.tasks),  # never for the text, whose log-probabilities are asked for
        **settings.engine_args,
    }
    if not settings.tasks:
        arguments.setdefault("max_model_len", samples.shape[1] + 1)
        predict(LLM(request.model, **arguments), samples, request)
        return {}
    from lm_eval.models.vllm_causallms import VLLM

    harness = VLLM(request.model, **arguments)
    predict(harness.model, samples, request)
    return run_tasks(harness, settings, Path(request.answers) if request.answers else None)


def predict(llm: LLM, samples: torch.Tensor, request: Request) -> None:
    """Writes the predictions for the missing samples."""
    from vllm import SamplingParams, TokensPrompt

    folder = PredictionsFolder(Path(request.predictions))
    top_k = min(max(1, request.settings.top_k), llm.llm_engine.model_config.get_vocab_size())
    how = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=top_k, flat_logprobs=True, detokenize=False)
    for begin in range(0, len(request.missing), SAMPLES_AT_ONCE):
        indices = request.missing[begin : begin + SAMPLES_AT_ONCE]
        prompts = [TokensPrompt(prompt_token_ids=samples[index].tolist()) for index in indices]
        for index, output in zip(indices, llm.generate(prompts, how, use_tqdm=False), strict=True):
            folder.write(index, _predictions(output.prompt_logprobs, top_k))


def _predictions(found: Any, top_k: int) -> Predictions:
    """Reads vLLM's flat log-probabilities: at every place but the first the token that follows, then the likeliest."""
    tokens = torch.tensor(found.token_ids, dtype=torch.int32).view(-1, top_k + 1)
    logprobs = torch.tensor(found.logprobs, dtype=torch.float32).view(-1, top_k + 1)
    return Predictions(following=logprobs[:, 0], top=tokens[:, 1], tokens=tokens[:, 1:], logprobs=logprobs[:, 1:])


if __name__ == "__main__":
    main(*sys.argv[1:])
