# SPDX-License-Identifier: Apache-2.0
"""Hours of mixed traffic in minutes: is `vllm serve` on a pruned model right, and does its memory stay flat?

    python -m benchmarks.soak --model build/demo/pruned --minutes 30 --json soak.json
    python -m benchmarks.soak --model serving_examples/tiny_qwen3_moe --stock        # whose fault is it?
    python -m benchmarks.soak --model build/demo/pruned --malformed 1000             # half of the requests are wrong

Clients send completions and chats, streamed and whole, hang up in the middle of streams, and send prompts longer than
the context and requests that are wrong in some way, which must not end in a status of 500. Every answer, also the part
before a client hung up, must be the greedy answer that an engine gave offline to the same prompt alone in its batch.
Weights are fp32, where batching changes logits by rounding only; prompts on whose answer the two best tokens are ever
closer than MIN_GAP are not asked, because rounding may decide them. Fails (exit code 1) on an error, a wrong answer, a
request left behind in the engine, a process of the server that is gone, or memory that grows.
"""

import argparse
import asyncio
import inspect
import json
import multiprocessing
import os
import random
import sys
import textwrap
import time
import urllib.request
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
from openai import AsyncOpenAI, BadRequestError
from openai.types import CompletionChoice

from benchmarks.vllm_server import DEFAULT_ENVIRONMENT, serve

MAX_MODEL_LEN = 512
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
SERVE_OPTIONS = (
    "--dtype",
    "float32",
    "--max-model-len",
    str(MAX_MODEL_LEN),
    "--chat-template",
    CHAT_TEMPLATE,
    "--num-gpu-blocks-override",
    "32",  # of 128 tokens: few, so that requests get preempted
    "--disable-uvicorn-access-log",
)
MIN_GAP = 1e-3  # log-probability; logits of the same prompt in another batch differ by less than 1e-4
KINDS = {"whole": 8, "streamed": 8, "hung up": 5, "too long": 1, "malformed": 4}  # how often
WRONG_VALUES = {
    "prompt": ([], [[]], [-1], [10**9], [0.5], [[1], "x"], {}, None, 7, "\x00", "\ud800", "x" * 10**6),
    "messages": ([], {}, "x", [{}], [{"role": "x", "content": {}}], [{"role": "user", "content": [{"type": "x"}]}]),
    "model": ("nobody", "", None, 7, "../../etc/passwd"),
    "max_tokens": (-1, 0, 10**12, 2**63, "x", 0.5, None, []),
    "temperature": (-1, 10**400, "hot", [], {}),
    "n": (0, -1, 10**6, "x"),
    "logprobs": (-5, 10**6, "x"),
    "stop": (7, [7], [""] * 100, {}),
    "stream": ("maybe", 7, {}),
    "logit_bias": ({"x": 1}, {"999999999": 1}, [], 7),
    "response_format": ({"type": "x"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": 7}}, 7),
    "echo": ("x", {}),
}
ENDS = {  # what a client sends before it hangs up, by kind: headers, and the share of the body
    "body cut short": ("Content-Length: {more}", 0.5),
    "endless body": ("Content-Length: 1000000000000", 1.0),
    "chunk cut short": ("Transfer-Encoding: chunked", 0.5),
    "no chunk size": ("Transfer-Encoding: chunked", 1.0),
}
SAMPLE_SECONDS = 2


class Task(NamedTuple):
    """A prompt and the number of tokens to answer with."""

    prompt: str
    chat: bool
    max_tokens: int


def make_tasks(count: int, seed: int) -> list[Task]:
    """Pieces of Python source of 20 to 800 characters, half of them asked as chats."""
    rng, text = random.Random(seed), inspect.getsource(argparse) + inspect.getsource(textwrap)
    tasks = []
    for number in range(count):
        start, length = rng.randrange(len(text) - 1000), int(20 * 40 ** rng.random())
        tasks.append(Task(text[start : start + length], number % 2 == 1, rng.randint(8, 96)))
    return tasks


def offline_answers(model: str, stock: bool, tasks: list[Task]) -> dict[Task, str]:
    """Greedy answers, one prompt at a time in eager mode; without the tasks that rounding may decide.

    Wants a process of its own, whose environment it changes.
    """
    os.environ |= {**DEFAULT_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    if stock:
        os.environ["VLLM_PLUGINS"] = ""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=1,
        enable_prefix_caching=False,
        enforce_eager=True,
    )
    answers = {}
    for task in tasks:
        params = SamplingParams(temperature=0, max_tokens=task.max_tokens, ignore_eos=True, logprobs=2)
        ask = (
            partial(llm.chat, messages(task), chat_template=CHAT_TEMPLATE)
            if task.chat
            else partial(llm.generate, task.prompt)
        )
        answer = ask(sampling_params=params, use_tqdm=False)[0].outputs[0]
        assert answer.logprobs is not None  # asked for above
        best = [sorted((found.logprob for found in step.values()), reverse=True) for step in answer.logprobs]
        if min(first - second for first, second, *_ in best) > MIN_GAP:
            answers[task] = answer.text
    return answers


class Soak:
    """What the clients of one server saw. `answers`: expected text by task."""

    def __init__(self, url: str, model: str, answers: dict[Task, str], malformed: int | None = None) -> None:
        """`malformed`: the number of malformed requests after which clients stop, instead of a time."""
        self.url, self.model, self.answers, self.malformed = url, model, answers, malformed
        self.kinds = KINDS | ({} if malformed is None else {"malformed": sum(KINDS.values()) - KINDS["malformed"]})
        self.sent = 0
        self.outcomes: Counter[str] = Counter()
        self.client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        self.raw = httpx.AsyncClient(timeout=300)
        self.requests: Counter[str] = Counter()
        self.errors: list[str] = []
        self.mismatches: list[str] = []
        self.rss: list[tuple[float, dict[str, float]]] = []

    async def run(self, seconds: float, concurrency: int, seed: int) -> None:
        """Keeps `concurrency` clients busy and samples the memory meanwhile."""
        start = time.monotonic()
        sampling = asyncio.create_task(self._sample_memory(start))
        clients = (self._client(random.Random(f"{seed} {i}"), start + seconds) for i in range(concurrency))
        await asyncio.gather(*clients)
        sampling.cancel()
        self.rss.append((time.monotonic() - start, resident_mib()))
        await self.client.close()
        await self.raw.aclose()

    async def _sample_memory(self, start: float) -> None:
        while True:
            self.rss.append((time.monotonic() - start, resident_mib()))
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _client(self, rng: random.Random, deadline: float) -> None:
        tasks = list(self.answers)
        while time.monotonic() < deadline if self.malformed is None else self.sent < self.malformed:
            (kind,) = rng.choices(list(self.kinds), list(self.kinds.values()))
            task = rng.choice(tasks)
            try:
                await self._ask(kind, task, hang_up_after=rng.randint(1, task.max_tokens // 2))
            except Exception as error:  # whatever the server or the connection does wrong
                self.errors.append(f"{kind} {type(error).__name__}: {error}"[:300])
            self.requests[f"{'chat' if task.chat else 'completion'}, {kind}"] += 1

    async def _ask(self, kind: str, task: Task, hang_up_after: int) -> None:
        """One request of `kind`, its answer compared."""
        if kind == "too long":
            try:
                await self._create(task._replace(prompt=task.prompt * MAX_MODEL_LEN), stream=False)
            except BadRequestError:
                return
            raise ValueError("a prompt longer than the context was answered")
        if kind == "malformed":
            await self._send_malformed(task, hang_up_after)
            return
        expected = self.answers[task]
        if kind == "whole":
            found = text_of((await self._create(task, stream=False)).choices[0])
        else:
            found, chunks = "", 0
            async with await self._create(task, stream=True) as stream:
                async for chunk in stream:
                    found, chunks = found + text_of(chunk.choices[0]), chunks + 1
                    if kind == "hung up" and chunks == hang_up_after:
                        expected = expected[: len(found)]
                        break
        if found != expected:
            self.mismatches.append(f"{kind} {task}: {found!r} instead of {expected!r}")

    async def _send_malformed(self, task: Task, seed: int) -> None:
        """Sends a body with a wrong value, no JSON, or a part of a body; what comes back is no server error."""
        self.sent += 1
        rng = random.Random(f"{seed} {self.sent}")
        kind, body = malformed(task, self.model, rng)
        path = f"/v1/{'chat/completions' if task.chat else 'completions'}"
        if rng.random() < 0.2:
            kind = rng.choice(list(ENDS))
            self.outcomes[f"{kind}, {await self._hang_up(path, body, *ENDS[kind])}"] += 1
            return
        headers = {"Content-Type": "application/json"}
        response = await self.raw.post(self.url + path, content=body, headers=headers)
        self.outcomes[f"{kind}, {response.status_code // 100}xx"] += 1
        if response.status_code >= 500:
            raise ValueError(f"status {response.status_code} for {body[:200]!r}: {response.text[:200]}")

    async def _hang_up(self, path: str, body: bytes, header: str, share: float) -> str:
        """Sends a share of a body and hangs up. Returns what came before that: a status, or "dropped" if nothing."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        head += header.format(more=len(body) + 1) + "\r\n\r\n"
        if "chunked" in header and share < 1:
            head += f"{len(body):x}\r\n"
        writer.write(head.encode() + body[: int(share * len(body))])
        await writer.drain()
        line = b""
        with suppress(TimeoutError, ConnectionError):
            line = await asyncio.wait_for(reader.readline(), 0.2)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        return f"{line.split()[1].decode()[0]}xx" if line else "dropped"

    def _create(self, task: Task, stream: bool) -> Any:
        options: dict[str, Any] = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": task.max_tokens,
            "stream": stream,
            "extra_body": {"ignore_eos": True},
        }
        if task.chat:
            return self.client.chat.completions.create(messages=messages(task), **options)
        return self.client.completions.create(prompt=task.prompt, **options)


def malformed(task: Task, model: str, rng: random.Random) -> tuple[str, bytes]:
    """A request that is right but for one value, or is no JSON, and what is wrong with it."""
    asked = {"messages": messages(task)} if task.chat else {"prompt": task.prompt}
    right = {"model": model, "max_tokens": 8, "temperature": 0, **asked}
    name = rng.choice(list(WRONG_VALUES))
    text = json.dumps({**right, name: rng.choice(WRONG_VALUES[name])})
    kind = rng.randrange(8)
    if kind == 0:
        return "half of a JSON", text[: rng.randrange(len(text))].encode()
    if kind == 1:
        return "nested 50,000 deep", b"[" * 50_000
    if kind == 2:
        return "not a number", text.replace("0", "NaN", 1).encode()
    return f"wrong {name}", text.encode()


def messages(task: Task) -> list[Any]:
    return [{"role": "user", "content": task.prompt}]


def text_of(choice: Any) -> str:
    """Text of a completion's or a chat's choice, streamed or whole."""
    if isinstance(choice, CompletionChoice):
        return choice.text
    return (choice.delta if hasattr(choice, "delta") else choice.message).content or ""


def resident_mib() -> dict[str, float]:
    """Resident memory in MiB of this process's descendants, the server's processes, by name and number."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found[f"{process.name()} {process.pid}"] = round(process.memory_info().rss / 2**20, 1)
    return found


def metrics(url: str) -> dict[str, float]:
    """The server's metrics that have one value, by name without `vllm:`."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        lines = [line for line in response.read().decode().splitlines() if line.startswith("vllm:")]
    return {line.partition("{")[0].removeprefix("vllm:"): float(line.rsplit(" ", 1)[1]) for line in lines}


def left_behind(url: str) -> dict[str, float]:
    """Requests and share of cache blocks still in use when all clients are gone, after at most 10 s of grace."""
    for _ in range(10):
        found = metrics(url)
        left = {name: found[name] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")}
        if not any(left.values()):
            break
        time.sleep(1)
    return left


def lost_processes(samples: list[tuple[float, dict[str, float]]]) -> list[str]:
    """The engine's processes that were there at the start and are not at the end."""
    (_, first), (_, last) = samples[0], samples[-1]
    return sorted(name for name in first.keys() - last.keys() if "VLLM" in name)


def memory_growth(samples: list[tuple[float, dict[str, float]]], warm_up: float) -> dict[str, float]:
    """MiB at the start, after `warm_up` seconds, at the end and at most; growth after the warm-up in percent."""
    totals = [(second, sum(mib.values())) for second, mib in samples]
    warm = [total for second, total in totals if second >= warm_up]
    return {
        "start": round(totals[0][1], 1),
        "warm": round(warm[0], 1),
        "end": round(warm[-1], 1),
        "max": round(max(warm), 1),
        "growth_percent": round(100 * (max(warm) / warm[0] - 1), 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("build/demo/pruned"))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument(
        "--malformed", type=int, metavar="N", help="instead of --minutes: stop after N malformed requests"
    )
    parser.add_argument("--warm-up", type=float, help="minutes until memory must stay flat (default: a third)")
    parser.add_argument("--max-growth", type=float, default=3, help="percent of resident memory")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=64, help="different prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock", action="store_true", help="without plugins, for a model that is not pruned")
    parser.add_argument("--json", type=Path, help="write the report here too")
    parser.add_argument("--log", type=Path, default=Path("build/soak.log"), help="the server's output")
    parser.add_argument("options", nargs="*", help="further options of vllm serve, after --")
    args = parser.parse_args()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        tasks = make_tasks(args.prompts, args.seed)
        answers = pool.submit(offline_answers, str(args.model), args.stock, tasks).result()
    print(f"{len(answers)} of {len(tasks)} prompts have a clear greedy answer", file=sys.stderr, flush=True)
    with serve(args.model, *SERVE_OPTIONS, *args.options, log=args.log, plugins="" if args.stock else None) as url:
        soak = Soak(url, str(args.model), answers, args.malformed)
        start = time.monotonic()
        asyncio.run(soak.run(60 * args.minutes, args.concurrency, args.seed))
        seconds = time.monotonic() - start
        left, counts = left_behind(url), metrics(url)
    warm_up = seconds / 3 if args.warm_up is None else 60 * args.warm_up
    lost = lost_processes(soak.rss)
    report = {
        "model": str(args.model),
        "minutes": round(seconds / 60, 2),
        "concurrency": args.concurrency,
        "prompts": len(answers),
        "requests": dict(sorted(soak.requests.items())),
        "malformed": dict(sorted(soak.outcomes.items())),
        "errors": len(soak.errors),
        "mismatches": len(soak.mismatches),
        "left_behind": left,
        "lost_processes": lost,
        "tokens_per_second": round(counts["generation_tokens_total"] / seconds, 1),
        "preemptions": counts["num_preemptions_total"],
        "rss_mib": memory_growth(soak.rss, warm_up),
        "examples": soak.errors[:5] + soak.mismatches[:5],
    }
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps({**report, "rss_samples": soak.rss}) + "\n")
    failed = (
        soak.errors
        or soak.mismatches
        or any(left.values())
        or lost
        or report["rss_mib"]["growth_percent"] > args.max_growth
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
