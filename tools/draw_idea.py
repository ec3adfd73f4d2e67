# SPDX-License-Identifier: Apache-2.0
"""Draws docs/idea.svg: experts, what pruning removes from them, and the rows that stay in memory.

python -m tools.draw_idea
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

WIDTHS = (15, 8, 13, 5, 16, 15)  # neurons that each of the six drawn experts keeps, of FULL
FULL = 16
COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2", "#9c6b4e")
UNIT, BAR, STEP = 13, 20, 32  # pixels: width of a neuron, height of a bar, from one bar to the next
TOP, LEFT = 66, 92
MEMORY_LEFT, MEMORY_COLUMNS = 470, 12
GAP = 2
PATH = Path(__file__).parent.parent / "docs" / "idea.svg"
STYLE = """
    text { font: 13px system-ui, sans-serif; fill: #57606a }
    .title { font-weight: 600; fill: #24292f }
    .pruned { fill: none; stroke: #8c959f; stroke-dasharray: 3 2 }
    .arrow { fill: none; stroke: #8c959f; stroke-width: 2 }
    @media (prefers-color-scheme: dark) { text { fill: #9198a1 } .title { fill: #f0f6fc } }
"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def cell(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="2" fill="{color}"/>'


def experts() -> Iterator[str]:
    """One bar per expert: its kept neurons filled, the removed part an empty frame."""
    yield text(LEFT, TOP - 34, "One layer's experts after pruning", "title")
    yield text(LEFT, TOP - 14, "each at its own width; frames were removed")
    for expert, (width, color) in enumerate(zip(WIDTHS, COLORS, strict=True)):
        y = TOP + expert * STEP
        yield text(LEFT - 10, y + 15, f"expert {expert}", anchor="end")
        for neuron in range(width):
            yield cell(LEFT + neuron * UNIT, y, UNIT - GAP, BAR, color)
        if width < FULL:
            x, length = LEFT + width * UNIT, (FULL - width) * UNIT - GAP
            yield f'<rect x="{x}" y="{y}" width="{length}" height="{BAR}" rx="2" class="pruned"/>'


def memory() -> Iterator[str]:
    """The kept neurons of all experts one after another, as rows of one flat parameter."""
    yield text(MEMORY_LEFT, TOP - 34, "In memory: packed rows", "title")
    yield text(MEMORY_LEFT, TOP - 14, "the kept neurons of all experts, end to end")
    colors = [color for width, color in zip(WIDTHS, COLORS, strict=True) for _ in range(width)]
    size = 22
    for row, color in enumerate(colors):
        line, column = divmod(row, MEMORY_COLUMNS)
        yield cell(MEMORY_LEFT + column * size, TOP + line * (BAR + 4), size - GAP, BAR, color)
    lines = -(-len(colors) // MEMORY_COLUMNS)
    kept = sum(WIDTHS) / (FULL * len(WIDTHS))
    y = TOP + lines * (BAR + 4) + 22
    yield text(MEMORY_LEFT, y, f"{sum(WIDTHS)} of {FULL * len(WIDTHS)} neurons, {kept:.0%} of the bytes")


def arrow() -> str:
    x, y = LEFT + FULL * UNIT + 42, TOP + 2.5 * STEP + BAR / 2
    return f'<path class="arrow" d="M{x} {y}h64m-9 -7l9 7l-9 7"/>'


def picture() -> str:
    width, height = MEMORY_LEFT + MEMORY_COLUMNS * 22 + 30, TOP + len(WIDTHS) * STEP + 12
    parts: Sequence[str] = (*experts(), arrow(), *memory())
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    title = "<title>Experts of differing width and their packed rows in memory</title>"
    return "\n  ".join((head, title, f"<style>{STYLE}  </style>", *parts)) + "\n</svg>\n"


if __name__ == "__main__":
    PATH.write_text(picture())
    sys.stdout.write(f"{PATH}\n")
