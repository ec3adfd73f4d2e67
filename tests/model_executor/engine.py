# SPDX-License-Identifier: Apache-2.0
"""vLLM engines in a process of their own: `python -m tests.model_executor.engine` reads a spec, prints results.

The spec is JSON on standard input: `{"llm": {LLM arguments}, "steps": ["generate", "reload", ...]}`, with
`"models"` or `"variants"` for several engines after another.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
               "VLLM_NO_USAGE_STATS": "1", "TRITON_INTERPRET": "0"}
PROMPTS = [[5, 80, 33, 7], list(range(60, 90)), [17] * 3, [250, 3, 199, 42, 42, 8]]
LONG_PROMPT = [5, 80, 33, 7] * 20  # several blocks, several chunks, and n-grams that repeat
MARKER = "RESULT "


def run(model: Path, *, steps: tuple[str, ...] = ("generate",), env: dict[str, str] | None = None,
        **llm: Any) -> subprocess.CompletedProcess:
    """Runs an engine on `model` in fp32 and returns the finished process; `results` reads its output."""
    spec = {"llm": {"model": str(model), "dtype": "float32", "max_model_len": 128, "enforce_eager": True, **llm},
            "steps": steps}
    return subprocess.run([sys.executable, "-m", "tests.model_executor.engine"], input=json.dumps(spec), text=True,
                          capture_output=True, cwd=ROOT, env={**os.environ, **ENVIRONMENT, **(env or {})}, timeout=300)


def generate_many(models: list[Path], *, env: dict[str, str], **llm: Any) -> list[dict[str, Any] | None]:
    """One engine after another in a single process; None for a model that fails, with the reason on standard error."""
    spec = {"llm": {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, **llm},
            "models": [str(model) for model in models]}
    process = subprocess.run([sys.executable, "-m", "tests.model_executor.engine"], input=json.dumps(spec), text=True,
                             capture_output=True, cwd=ROOT, env={**os.environ, **ENVIRONMENT, **env},
                             timeout=120 + 120 * len(models))
    sys.stderr.write("".join(line + "\n" for line in process.stderr.splitlines() if "FAILED " in line))
    return results(process)


def answer_many(variants: dict[str, dict[str, Any]], *, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Answers of one engine per variant, all in a single process; None for an engine that fails.

    A variant is LLM arguments, and under "lora" the folder of an adapter to answer with.
    """
    common = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, "disable_log_stats": False}
    spec = {"variants": [common | variant for variant in variants.values()]}
    process = subprocess.run([sys.executable, "-m", "tests.model_executor.engine"], input=json.dumps(spec), text=True,
                             capture_output=True, cwd=ROOT, env={**os.environ, **ENVIRONMENT, **(env or {})},
                             timeout=120 + 120 * len(variants))
    sys.stderr.write("".join(line + "\n" for line in process.stderr.splitlines() if "FAILED " in line))
    return dict(zip(variants, results(process), strict=True))


def results(process: subprocess.CompletedProcess) -> list[dict[str, Any]]:
    """Per step that generates: token ids and prompt logprobs of every prompt."""
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    line = next(line for line in process.stdout.splitlines() if line.startswith(MARKER))
    return json.loads(line.removeprefix(MARKER))


def generate(llm: Any) -> dict[str, Any]:
    from vllm import SamplingParams

    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS],
                           SamplingParams(temperature=0, max_tokens=16, prompt_logprobs=0, ignore_eos=True))
    return {"ids": [list(output.outputs[0].token_ids) for output in outputs],
            "logprobs": [[logprobs[token].logprob for token, logprobs in
                          zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
                         for prompt, output in zip(PROMPTS, outputs, strict=True)]}


def answer(llm: Any, lora: str | None = None) -> dict[str, Any]:
    """Token ids and their logprobs; how many prompt tokens were cached, how many tokens were drafted so far."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    outputs = llm.generate([{"prompt_token_ids": ids} for ids in [*PROMPTS, LONG_PROMPT]],
                           SamplingParams(temperature=0, max_tokens=16, logprobs=0, ignore_eos=True),
                           lora_request=LoRARequest("adapter", 1, lora) if lora else None)
    answers = [output.outputs[0] for output in outputs]
    drafted = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_draft_tokens")
    return {"ids": [list(answer.token_ids) for answer in answers],
            "logprobs": [[step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)]
                         for answer in answers],
            "cached": sum(output.num_cached_tokens for output in outputs), "drafted": drafted}


def main() -> None:
    spec = json.load(sys.stdin)
    from vllm import LLM

    if "models" in spec:
        print(MARKER + json.dumps([attempt(generate, model=model, **spec["llm"]) for model in spec["models"]]))
        return
    if "variants" in spec:
        print(MARKER + json.dumps([attempt(partial(answer_twice, lora=variant.pop("lora", None)), **variant)
                                   for variant in spec["variants"]]))
        return
    llm = LLM(**spec["llm"])
    found = []
    for step in spec["steps"]:
        if step == "generate":
            found.append(generate(llm))
        elif step == "reload":
            llm.collective_rpc("reload_weights")
        elif step == "loading":
            found.append(llm.collective_rpc("loading"))
        elif step == "expert_tensors":
            found.append(llm.apply_model(expert_tensors)[0])
    print(MARKER + json.dumps(found))


def answer_twice(llm: Any, lora: str | None) -> list[dict[str, Any]]:
    return [answer(llm, lora), answer(llm, lora)]


def attempt(ask: Callable[[Any], Any], **arguments: Any) -> Any:
    """What `ask` gets out of one engine, which is gone afterwards; None if that fails."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        return ask(LLM(**arguments))
    except Exception as error:  # any failure is a result here
        reason = " ".join(str(error).split())[-600:]
        print(f"FAILED {arguments['model']}: {type(error).__name__}: {reason}", file=sys.stderr)
        return None
    finally:
        cleanup_dist_env_and_memory()


def expert_tensors(model: Any) -> dict[str, int]:
    """Bytes of the routed experts' parameters, and where their index tables are registered."""
    return {"parameter_bytes": sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name),
            "tables_in_state_dict": sum(".heapr_" in name for name in model.state_dict()),
            "tables_in_buffers": sum(".heapr_" in name for name, _ in model.named_buffers())}


if __name__ == "__main__":
    main()
