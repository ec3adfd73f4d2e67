# SPDX-License-Identifier: Apache-2.0
"""What vLLM serves, on text and on tasks: `heapr eval --backend vllm`.

    python -m heapr_vllm.evaluation.served REQUEST.json

is one engine in a process of its own, so that the next model finds the device empty.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
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
from heapr_vllm.prune.text.samples import Sample, Samples

if TYPE_CHECKING:
    from vllm import LLM

TEXT, ANSWER, REFUSAL, ERRORS = "samples.safetensors", "outcomes.json", "refusal.txt", "errors.txt"
SAMPLES_AT_ONCE = 16  # so that little is lost by a kill, and little lies in memory
PATIENCE = 10.0  # seconds that an engine has to end before it is killed


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
    samples: Samples,
    missing: list[int],
    folder: PredictionsFolder,
    settings: EvaluationSettings,
    answers: Path | None,
) -> dict[str, Outcomes]:
    """Predicts the `missing` ones of `samples`, each its own context, and runs the tasks.

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
        save_file(_tensors(samples), work / TEXT)
        (work / "request.json").write_text(json.dumps(asdict(request)))
        command = [sys.executable, "-P", "-m", "heapr_vllm.evaluation.served", str(work / "request.json")]
        run_alone(command, work / ERRORS)
        if (work / REFUSAL).is_file():
            raise HeaprError((work / REFUSAL).read_text())
        if not (work / ANSWER).is_file():
            reason = [line for line in (work / ERRORS).read_text(errors="replace").splitlines() if line.strip()]
            raise HeaprError(f"vLLM could not evaluate {checkpoint.path}: {reason[-1] if reason else 'no output'}")
        return read_json(work / ANSWER, dict[str, Outcomes], "evaluate again")


def run_alone(command: list[str], errors: Path) -> None:
    """Waits for a command, whose stderr goes to the file `errors`; all processes that it started end with the wait."""
    env = {"VLLM_LOGGING_LEVEL": "ERROR", **os.environ}
    with errors.open("wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=env, start_new_session=True)
    try:
        process.wait()
    except BaseException:  # Ctrl-C or SIGTERM: nobody else tells a session of its own
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(PATIENCE)
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tensors(samples: Samples) -> dict[str, torch.Tensor]:
    ids = {f"ids.{number}": sample.ids.clone() for number, sample in enumerate(samples.entries)}
    return ids | {f"counted.{number}": sample.counted.clone() for number, sample in enumerate(samples.entries)}


def _samples(tensors: dict[str, torch.Tensor]) -> Samples:
    """Inverts `_tensors`."""
    numbers = range(len(tensors) // 2)
    return Samples([Sample(tensors[f"ids.{number}"], tensors[f"counted.{number}"]) for number in numbers])


def main(path: str) -> None:
    work = Path(path).parent
    request = parse_json(Path(path).read_bytes(), Request, path, "evaluate again")
    try:
        outcomes = answer(request, _samples(load_file(work / TEXT)))
    except HeaprError as error:
        (work / REFUSAL).write_text(str(error))
        sys.exit(2)
    (work / ANSWER).write_text(json.dumps({task: asdict(each) for task, each in outcomes.items()}))


def answer(request: Request, samples: Samples) -> dict[str, Outcomes]:
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
        arguments.setdefault("max_model_len", max(len(sample.ids) for sample in samples.entries) + 1)
        predict(LLM(request.model, **arguments), samples, request)
        return {}
    from lm_eval.models.vllm_causallms import VLLM

    harness = VLLM(request.model, **arguments)
    predict(harness.model, samples, request)
    return run_tasks(harness, settings, Path(request.answers) if request.answers else None)


def predict(llm: LLM, samples: Samples, request: Request) -> None:
    """Writes the predictions for the missing samples."""
    from vllm import SamplingParams, TokensPrompt

    folder = PredictionsFolder(Path(request.predictions))
    top_k = min(max(1, request.settings.top_k), llm.llm_engine.model_config.get_vocab_size())
    how = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=top_k, flat_logprobs=True, detokenize=False)
    for begin in range(0, len(request.missing), SAMPLES_AT_ONCE):
        indices = request.missing[begin : begin + SAMPLES_AT_ONCE]
        prompts = [TokensPrompt(prompt_token_ids=samples.entries[index].ids.tolist()) for index in indices]
        for index, output in zip(indices, llm.generate(prompts, how, use_tqdm=False), strict=True):
            found = _predictions(output.prompt_logprobs, top_k)
            folder.write(index, found.at(samples.entries[index].counted[1:]))


def _predictions(found: Any, top_k: int) -> Predictions:
    """Reads vLLM's flat log-probabilities: at every place but the first the token that follows, then the likeliest."""
    tokens = torch.tensor(found.token_ids, dtype=torch.int32).view(-1, top_k + 1)
    logprobs = torch.tensor(found.logprobs, dtype=torch.float32).view(-1, top_k + 1)
    return Predictions(following=logprobs[:, 0], top=tokens[:, 1], tokens=tokens[:, 1:], logprobs=logprobs[:, 1:])


if __name__ == "__main__":
    main(*sys.argv[1:])
