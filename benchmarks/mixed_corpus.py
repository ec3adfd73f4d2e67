# SPDX-License-Identifier: Apache-2.0
"""Three kinds of text, each in a part to calibrate on and one held out: code, prose and tool calls.

    python -m benchmarks.mixed_corpus -o build/mixed

writes `code`, `prose` and `tools`, each as `NAME.calibration.jsonl` and `NAME.held_out.jsonl`, of `{"text": ...}`. Code
and prose are Python sources of the environment without and their docstrings alone, split by file as
`serving_examples/python_corpus.py` does; tool calls are conversations in JSON about made-up cities, shops and servers,
drawn with a seed.
"""

import argparse
import ast
import inspect
import json
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from serving_examples import python_corpus

SPLITS = ("calibration", "held_out")
SOURCES = ("code", "prose", "tools")
MIN_PROSE = 200  # characters of a docstring
CONVERSATIONS = 1500
CITIES = ("Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Perth", "Turin", "Accra", "Busan", "Porto", "Leeds", "Tunis")
THINGS = ("lamp", "kettle", "bicycle", "keyboard", "blanket", "notebook", "ladder", "speaker", "helmet", "teapot")
HOSTS = ("db-1", "db-2", "web-1", "web-2", "cache-1", "queue-1", "search-1", "mail-1")


def docstrings(text: str) -> Iterator[str]:
    """Yields the longer docstrings of a Python source; nothing if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node, clean=False)
            if found and len(found) >= MIN_PROSE:
                yield inspect.cleandoc(found)


def weather(dice: random.Random) -> tuple[str, str, dict, dict, str]:
    """Question, tool, arguments, result, answer."""
    city, day, degrees = dice.choice(CITIES), dice.choice(("today", "tomorrow")), dice.randint(-9, 39)
    sky = dice.choice(("sunny", "cloudy", "rainy", "windy"))
    answer = f"It will be {sky} in {city} {day}, at {degrees} degrees."
    return (
        f"What is the weather in {city} {day}?",
        "get_weather",
        {"city": city, "day": day},
        {"sky": sky, "degrees": degrees},
        answer,
    )


def order(dice: random.Random) -> tuple[str, str, dict, dict, str]:
    """As `weather`."""
    thing, count, price = dice.choice(THINGS), dice.randint(1, 9), dice.randint(3, 250)
    number = dice.randint(10000, 99999)
    return (
        f"Please order {count} of the {thing}.",
        "place_order",
        {"item": thing, "quantity": count},
        {"order_id": number, "total": count * price, "currency": "EUR"},
        f"I ordered {count} of the {thing} for {count * price} EUR. The order number is {number}.",
    )


def server(dice: random.Random) -> tuple[str, str, dict, dict, str]:
    """As `weather`."""
    host, load = dice.choice(HOSTS), dice.randint(1, 100)
    state = "healthy" if load < 80 else "overloaded"
    return (
        f"How is {host} doing?",
        "get_status",
        {"host": host},
        {"host": host, "state": state, "cpu_percent": load, "uptime_days": dice.randint(0, 400)},
        f"{host} is {state}, with {load}% of its CPU in use.",
    )


TOOLS: tuple[Callable[[random.Random], tuple[str, str, dict, dict, str]], ...] = (weather, order, server)


def conversation(dice: random.Random) -> str:
    """One conversation of a few turns as JSON lines, a message each."""
    messages = []
    for _ in range(dice.randint(2, 5)):
        question, tool, arguments, result, answer = dice.choice(TOOLS)(dice)
        call = {"id": f"call_{dice.randint(100, 999)}", "type": "function"}
        call["function"] = {"name": tool, "arguments": arguments}
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        messages.append({"role": "assistant", "content": answer})
    return "\n".join(map(json.dumps, messages)) + "\n"


def build() -> dict[tuple[str, str], list[str]]:
    """Texts by source and split."""
    python = python_corpus.build()
    texts: dict[tuple[str, str], list[str]] = {}
    for split in SPLITS:
        sources = list(python[split].values())
        texts["code", split] = sources
        texts["prose", split] = ["\n\n".join(docstrings(source)) for source in sources]
        dice = random.Random(split)
        texts["tools", split] = [conversation(dice) for _ in range(CONVERSATIONS)]
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for (source, split), texts in build().items():
        texts = list(filter(None, texts))
        path = output / f"{source}.{split}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        print(f"{path}: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
