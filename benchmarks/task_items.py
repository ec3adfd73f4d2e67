# SPDX-License-Identifier: Apache-2.0
"""Items of two small generation tasks, out of the held-out Python files of the bundled model's corpus.

    python serving_examples/python_corpus.py -o build/corpus
    python -m benchmarks.task_items --corpus build/corpus -o build/tasks

writes `brackets.jsonl` (write the closing brackets that must begin the next line) and `identifiers.jsonl` (write the
rest of a name that stands earlier in the prompt): at most one item a file, drawn by the file's name. The tasks
themselves are in `benchmarks/tasks`; they read `build/tasks`, so `heapr eval --include-path benchmarks/tasks` runs in
the repository.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

CHARACTERS = 700  # of a prompt at most: within the bundled model's 512 positions
MIN_CHARACTERS = 200
MIN_NAME, MIN_SHOWN = 8, 3  # characters
OPENERS, CLOSERS = frozenset("([{"), frozenset(")]}")
_NAME = re.compile(r"[A-Za-z_]\w*")

Place = tuple[int, str]  # where the prompt ends, in characters, and the answer


def python_tokens(text: str) -> list[tuple[tokenize.TokenInfo, int]]:
    """Splits source into tokens with their offsets in characters; none if it does not parse."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    try:
        found = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return []
    return [(token, starts[min(token.start[0] - 1, len(starts) - 1)] + token.start[1]) for token in found]


def bracket_places(text: str) -> Iterator[Place]:
    """Finds closing brackets that begin a line, no deeper than what they close, where nothing else can stand.

    The answer is all of them. The last space of the line's indentation is left out of the prompt, since tokenizers
    put it together with what follows.
    """
    openers: list[int] = []
    run, begin, indent = "", 0, 0
    for token, offset in python_tokens(text):
        if token.type == tokenize.OP and token.string in OPENERS:
            openers.append(len(token.line) - len(token.line.lstrip()))
        if token.type == tokenize.OP and token.string in CLOSERS and openers:
            opened = openers.pop()
            if not token.line[: token.start[1]].strip():
                run, begin, indent = token.string, offset, token.start[1]
                if indent > opened:
                    run = ""
            elif run and begin + len(run) == offset:
                run += token.string
            continue
        if run:
            yield begin - min(1, indent), run
        run = ""


def identifier_places(text: str) -> Iterator[Place]:
    """Finds names that stand earlier in their prompt and are the only ones there that begin with the shown words.

    The answer starts with an underscore.
    """
    for token, offset in python_tokens(text):
        name = token.string
        if token.type != tokenize.NAME or len(name) < MIN_NAME or "_" not in name[MIN_SHOWN:-1]:
            continue
        shown = name[: name.find("_", MIN_SHOWN)]
        before = _NAME.findall(prompt_before(text, offset))
        if {other for other in before if other.startswith(shown)} == {name}:
            yield offset + len(shown), name[len(shown) :]


TASKS: dict[str, Callable[[str], Iterator[Place]]] = {"brackets": bracket_places, "identifiers": identifier_places}


def prompt_before(text: str, end: int) -> str:
    """Cuts the whole lines before `end`, at most CHARACTERS, and the line that it cuts."""
    begin = max(0, end - CHARACTERS)
    if begin:
        begin = text.find("\n", begin, end) + 1 or begin
    return text[begin:end]


def item(task: str, path: str, text: str) -> dict[str, str] | None:
    """Draws one item of a file; None if the file has none."""
    draw = random.Random(f"{task} {path}")
    places = [(end, answer) for end, answer in TASKS[task](text) if len(prompt_before(text, end)) >= MIN_CHARACTERS]
    if not places:
        return None
    answer = draw.choice(sorted({answer for _, answer in places}))  # else most brackets would be the same two
    end = draw.choice([end for end, each in places if each == answer])
    return {"path": path, "prompt": prompt_before(text, end), "answer": answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument("-o", "--output", type=Path, default=Path("build/tasks"))
    args = parser.parse_args()
    files = [json.loads(line) for line in (args.corpus / "held_out.jsonl").open(encoding="utf-8")]
    args.output.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        items = [item(task, file["path"], file["text"]) for file in files]
        lines = [json.dumps(found) + "\n" for found in items if found]
        (args.output / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{task}: {len(lines)} items of {len(files)} files")


if __name__ == "__main__":
    main()
