# SPDX-License-Identifier: Apache-2.0
"""vLLM engines in processes of their own.

`python -m tests.model_executor.engine` runs several, one after another: it reads JSON from standard input,
`{"ask": "generate", "engines": [{LLM arguments}, ...]}`, and prints their outputs.
"""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path
from threading import Timer
from typing import Any

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "TRITON_INTERPRET": "0",
}
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
PROMPTS = [[5, 80, 33, 7], list(range(60, 90)), [17] * 3, [250, 3, 199, 42, 42, 8]]
LONG_PROMPT = [5, 80, 33, 7] * 20  # several blocks, several chunks, and n-grams that repeat
MARKER = "RESULT "
NO_ANSWER = "no answer in time"
ERROR = re.compile(r"(?<![\w.])\w*(Error|Exception)(: .*|$)")  # last line of a traceback, perhaps behind a prefix


def run(
    model: Path, *, steps: tuple[str, ...] = ("generate",), env: dict[str, str] | None = None, **llm: Any
) -> subprocess.CompletedProcess:
    """Runs an engine on `model` in fp32 and returns the finished process; `results` reads its output.

    The process is forked from one that has imported vLLM, which takes longer than the engine of a tiny model: `env`
    reaches what is read after the imports.
    """
    arguments = {"model": str(model), "dtype": "float32", "max_model_len": 128, "enforce_eager": True, **llm}
    environment = {**os.environ, **ENVIRONMENT, **(env or {})}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, "stdout"), Path(folder, "stderr")]
        process = _forks().Process(target=_forked, args=(arguments, steps, environment, outputs))
        process.start()
        try:
            process.join(300)
            is_late = process.exitcode is None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        assert not is_late, f"{NO_ANSWER}: {outputs[1].read_text()[-3000:]}"
        return subprocess.CompletedProcess(steps, process.exitcode, *(path.read_text() for path in outputs))


@cache
def _forks() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm", "transformers", __name__])
    return context


def _forked(
    arguments: dict[str, Any], steps: tuple[str, ...], environment: dict[str, str], outputs: list[Path]
) -> None:
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    serve_steps(arguments, steps)


def generate_many(
    models: list[Path], *, env: dict[str, str], limit: float = 600, **llm: Any
) -> Iterator[dict[str, Any] | str]:
    """What `generate` gets from an engine per model, or the reason for an engine that fails."""
    return _ask_many("generate", [{"model": str(model), **llm} for model in models], env, limit)


def answer_many(
    variants: dict[str, dict[str, Any]], *, env: dict[str, str] | None = None, ask: str = "answer_twice"
) -> dict[str, list | str]:
    """What the function `ask` gets from an engine per variant, or the reason for an engine that fails.

    A variant is LLM arguments, and under "lora" the folder of an adapter to answer with.
    """
    engines = [{"disable_log_stats": False, **variant} for variant in variants.values()]
    return dict(zip(variants, _ask_many(ask, engines, env or {}, 600), strict=True))


def _ask_many(ask: str, engines: list[dict[str, Any]], env: dict[str, str], limit: float) -> Iterator[Any]:
    """Output of one engine after another, in one process as long as it lives.

    Every model runs in the dtype it is stored in. An engine that needs more than `limit` seconds (its output is then
    NO_ANSWER), or takes its process down, costs no more than its own output.
    """
    done = 0
    while done < len(engines):
        for output in _outputs(ask, engines[done:], ENVIRONMENT | env, limit):
            done += 1
            yield output


def _outputs(ask: str, engines: list[dict[str, Any]], env: dict[str, str], limit: float) -> Iterator[Any]:
    """Outputs of a process of its own, until it dies or an engine takes too long."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.model_executor.engine"],
        stdin=subprocess.PIPE,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, **env},
        start_new_session=True,
    ) as process:
        try:
            process.stdin.write(json.dumps({"ask": ask, "engines": engines}))
            process.stdin.close()
            for _ in engines:
                yield _next_output(process, limit)
                if process.returncode is not None:  # known once its output has ended
                    return
        finally:
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            kill_group(process)


def _next_output(process: subprocess.Popen, limit: float) -> dict[str, Any] | str:
    """Reads up to the next output. If none comes, the process is gone afterwards."""
    timer, started = Timer(limit, kill_group, [process]), time.monotonic()
    timer.start()
    error = ""
    try:
        for line in process.stdout:
            if line.startswith(MARKER):
                output = json.loads(line.removeprefix(MARKER))
                return f"{error} {output}".strip() if isinstance(output, str) else output
            if not error and (match := ERROR.search(line)):
                error = match[0]
    finally:
        timer.cancel()
    is_late = process.wait() == -signal.SIGKILL and time.monotonic() - started >= limit
    return NO_ANSWER if is_late else f"{error} exit status {process.returncode}".strip()


def kill_group(process: subprocess.Popen) -> None:
    """Ends a process and what it started, among them engine and workers."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def results(process: subprocess.CompletedProcess) -> list[dict[str, Any]]:
    """Per step that generates: token ids and prompt logprobs of every prompt."""
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    line = next(line for line in process.stdout.splitlines() if line.startswith(MARKER))
    return json.loads(line.removeprefix(MARKER))


def generate(
    llm: Any,
    prompts: Sequence[list[int]] = PROMPTS,
    max_tokens: Sequence[int] = (16,) * len(PROMPTS),
    lora: str | None = None,
) -> dict[str, Any]:
    """Greedy ids, `max_tokens` of them by prompt, and prompt logprobs; with the adapter in folder `lora`."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        [SamplingParams(temperature=0, max_tokens=count, prompt_logprobs=0, ignore_eos=True) for count in max_tokens],
        lora_request=LoRARequest("adapter", 1, lora) if lora else None,
    )
    return {
        "ids": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [
            [logprobs[token].logprob for token, logprobs in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
            for prompt, output in zip(prompts, outputs, strict=True)
        ],
    }


def generate_without_and_with(llm: Any, lora: str) -> list[dict[str, Any]]:
    """Without the adapter, then with it."""
    return [generate(llm), generate(llm, lora=lora)]


def generate_little(llm: Any) -> dict[str, Any]:
    """For a slow kernel: a prefill, a step of two tokens and two of one; under "layers" `pruned_layers` by rank."""
    from tests.model_executor.pruned_layers import pruned_layers

    return {**generate(llm, PROMPTS[::2], (4, 2)), "layers": llm.apply_model(pruned_layers)}


def generate_little_twice(llm: Any) -> list[dict[str, Any]]:
    """The second time after `reload_weights`."""
    before = generate_little(llm)
    llm.collective_rpc("reload_weights")
    return [before, generate_little(llm)]


def answer(llm: Any, lora: str | None = None) -> dict[str, Any]:
    """Token ids and their logprobs; how many prompt tokens were cached, how many tokens were drafted so far."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in [*PROMPTS, LONG_PROMPT]],
        SamplingParams(temperature=0, max_tokens=16, logprobs=0, ignore_eos=True),
        lora_request=LoRARequest("adapter", 1, lora) if lora else None,
    )
    answers = [output.outputs[0] for output in outputs]
    drafted = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_draft_tokens")
    return {
        "ids": [list(answer.token_ids) for answer in answers],
        "logprobs": [
            [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)]
            for answer in answers
        ],
        "cached": sum(output.num_cached_tokens for output in outputs),
        "drafted": drafted,
    }


def serve_steps(arguments: dict[str, Any], steps: Sequence[str]) -> None:
    """Prints what the steps found in an engine."""
    from vllm import LLM

    llm = LLM(**arguments)
    found = []
    for step in steps:
        if step == "generate":
            found.append(generate(llm))
        elif step == "reload":
            llm.collective_rpc("reload_weights")
        elif step == "load for real":
            llm.collective_rpc("update_config", args=({"load_config": {"load_format": "auto"}},))
            llm.collective_rpc("reload_weights")
        elif step == "loading":
            found.append(llm.collective_rpc("loading"))
        elif step == "expert_tensors":
            found.append(llm.apply_model(expert_tensors)[0])
    print(MARKER + json.dumps(found), flush=True)


def main() -> None:
    spec = json.load(sys.stdin)
    for arguments in spec["engines"]:
        print("\n" + MARKER + json.dumps(attempt(globals()[spec["ask"]], **arguments)), flush=True)


def answer_twice(llm: Any, lora: str | None = None) -> list[dict[str, Any]]:
    return [answer(llm, lora), answer(llm, lora)]


def attempt(ask: Callable[..., Any], lora: str | None = None, **arguments: Any) -> Any:
    """What `ask` gets out of one engine, which is gone afterwards, or why it gets nothing."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        config = json.loads((Path(arguments["model"]) / "config.json").read_text())
        common = {"dtype": config.get("text_config", config)["dtype"], "max_model_len": 128, "enforce_eager": True}
        llm = LLM(**common | arguments)
        return ask(llm, lora) if lora else ask(llm)
    except Exception as error:  # any failure is a result here
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        cleanup_dist_env_and_memory()


def expert_tensors(model: Any) -> dict[str, int]:
    """Bytes of the routed experts' parameters, and where their index tables are registered."""
    return {
        "parameter_bytes": sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name),
        "tables_in_state_dict": sum(".heapr_" in name for name in model.state_dict()),
        "tables_in_buffers": sum(".heapr_" in name for name, _ in model.named_buffers()),
    }


if __name__ == "__main__":
    main()
