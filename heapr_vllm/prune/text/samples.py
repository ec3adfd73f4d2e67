# SPDX-License-Identifier: Apache-2.0
"""Calibration text: dataset specs to samples of token ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoTokenizer

from heapr_vllm.errors import HeaprError, first_line
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.schema import Count, Positive, Seed
from heapr_vllm.prune.text.chats import ChatRenderer, set_chat_template
from heapr_vllm.prune.text.documents import Conversations, read_dataset
from heapr_vllm.prune.text.sources import Source, parse_sources, share_out

POOL_FACTOR = 8  # samples are drawn from a pool this many times larger, so that they come from many documents
LOSSES = ("all", "assistant")


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Which text, and how it becomes samples.

    `dataset`: one spec or several, as `parse_sources` takes them. `text_column`: field of the records. `chat_template`:
    file of a template that replaces the model's own. `loss`: whose tokens count, "all" or the "assistant"'s.
    """

    dataset: str | list[str]
    max_seq_length: Positive = 2048
    seed: Seed = 0
    text_column: str | None = None
    chat_template: str | None = None
    loss: str = "all"


@dataclass(frozen=True)
class Sample:
    """One piece of text: `ids` int64 [L], `counted` bool [L], True where a token's prediction counts."""

    ids: torch.Tensor
    counted: torch.Tensor
    source: int = 0


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """What became of a source.

    `predictions`: tokens whose prediction counts. `truncated`: conversations cut at their end; `skipped`: those with
    nothing to predict.
    """

    name: str
    share: float
    samples: Count
    tokens: Positive
    predictions: Positive
    truncated: Count = 0
    skipped: Count = 0

    def __str__(self) -> str:
        notes = [f"{self.samples} samples, {self.tokens:,} tokens"]
        notes += [f"{self.truncated} cut at the longest length"] if self.truncated else []
        notes += [f"{self.skipped} left out, with nothing to predict"] if self.skipped else []
        return f"{self.name}: {', '.join(notes)}"


@dataclass(frozen=True)
class Samples:
    """Samples, those of a source one after the other; `sources` names them."""

    entries: list[Sample]
    sources: list[SourceRecord] = field(default_factory=list)

    @classmethod
    def equal(cls, ids: torch.Tensor) -> Samples:
        """Takes every row of int64 [N, L] as a sample of which all tokens count."""
        counted = torch.ones(ids.shape[1], dtype=torch.bool, device=ids.device)
        return cls([Sample(row, counted) for row in ids])

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(len(sample.ids) for sample in self.entries)

    @property
    def predictions(self) -> int:
        """Number of tokens whose prediction counts; the first of a sample is predicted from nothing."""
        return sum(int(sample.counted[1:].sum()) for sample in self.entries)

    def fingerprint(self) -> str:
        """Computes sha256 of the token ids, and where they are not equal rows that all count, of what tells more."""
        digest = hashlib.sha256()
        for sample in self.entries:
            digest.update(sample.ids.numpy().tobytes())
        shapes = {(sample.source, len(sample.ids), bool(sample.counted.all())) for sample in self.entries}
        if len(shapes) > 1 or not all(is_counted for _, _, is_counted in shapes):
            for sample in self.entries:
                digest.update(f"{sample.source} {len(sample.ids)}\n".encode())
                digest.update(sample.counted.numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"


def token_samples(
    documents: list[str], tokenizer: Any, num_samples: int, max_seq_length: int, seed: int
) -> torch.Tensor:
    """Draws int64 [num_samples, max_seq_length], seeded, from the documents joined by the end-of-text token.

    Documents begin with what the tokenizer puts before a prompt, if anything. They are taken in random order until the
    pool is full (or they run out), then samples are drawn at random. Raises HeaprError if there is too little text.
    """
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for index in torch.randperm(len(documents), generator=generator).tolist():
        ids += tokenizer(documents[index], verbose=False).input_ids
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= POOL_FACTOR * num_samples * max_seq_length:
            break
    available = len(ids) // max_seq_length
    if available < num_samples:
        raise HeaprError(
            f"the dataset has {available} samples of {max_seq_length} tokens, {num_samples} are needed; "
            "ask for fewer, lower --max-seq-length, or give more text"
        )
    samples = torch.tensor(ids[: available * max_seq_length]).view(available, max_seq_length)
    return samples[torch.randperm(available, generator=generator)[:num_samples]]


def chat_samples(
    chats: Conversations, renderer: ChatRenderer, num_samples: int, max_seq_length: int, seed: int
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], int, int]:
    """Draws `num_samples` conversations, seeded: ids and what counts of each; also how many were cut, and left out.

    A conversation longer than `max_seq_length` is cut at its end; one with nothing to predict is left out. Raises
    HeaprError if there are too few.
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    truncated = skipped = 0
    for index in torch.randperm(len(chats), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(found) == num_samples:
            break
        ids, counted = renderer.render(chats[index])
        if not counted[1:max_seq_length].any():
            skipped += 1
            continue
        truncated += len(ids) > max_seq_length
        found.append((ids[:max_seq_length], counted[:max_seq_length]))
    if len(found) < num_samples:
        raise HeaprError(
            f"the dataset has {len(found)} conversations with something to predict, {num_samples} are needed; ask for "
            "fewer, or give more conversations"
        )
    return found, truncated, skipped


def draw_samples(checkpoint: Checkpoint, settings: TextSettings, num_samples: int) -> Samples:
    """Draws `num_samples` of the sources for a checkpoint, by their shares.

    Text is cut into samples of `max_seq_length` tokens, a conversation is a sample. Raises HeaprError if there are too
    few, if the model has too few positions, or if a source cannot be read or rendered.
    """
    length, limit = settings.max_seq_length, checkpoint.text.max_position_embeddings
    if length < 2:
        raise HeaprError("--max-seq-length 1 leaves nothing to predict; pass 2 or more, better hundreds")
    if limit is not None and length > limit:
        raise HeaprError(
            f"--max-seq-length {length} exceeds the model's {limit} positions; pass --max-seq-length {limit}"
        )
    if settings.loss not in LOSSES:
        raise HeaprError(f"--loss {settings.loss} is not one of {', '.join(LOSSES)}; choose one")
    sources = parse_sources(settings.dataset)
    counts = share_out(sources, num_samples)
    is_alone = len(sources) == 1
    texts = [read_dataset(source.spec, settings.text_column, is_alone=is_alone) for source in sources]
    if settings.loss == "assistant" and not any(isinstance(text, Conversations) for text in texts):
        raise HeaprError("--loss assistant needs conversations, and this is text; name some, or use --loss all")
    tokenizer = load_tokenizer(checkpoint)
    if settings.chat_template is not None and any(isinstance(text, Conversations) for text in texts):
        set_chat_template(tokenizer, settings.chat_template)
    samples = Samples([])
    for number, (source, count, text) in enumerate(zip(sources, counts, texts, strict=True)):
        try:
            found, record = _source_samples(source, number, count, text, tokenizer, settings)
        except HeaprError as error:
            raise error if len(sources) == 1 else HeaprError(f"source {source.name}: {error}") from error
        samples = Samples([*samples.entries, *found], [*samples.sources, record])
    return samples


def _source_samples(
    source: Source,
    number: int,
    count: int,
    text: list[str] | Conversations,
    tokenizer: Any,
    settings: TextSettings,
) -> tuple[list[Sample], SourceRecord]:
    """Draws the `count` samples of source `number`."""
    truncated = skipped = 0
    length, seed = settings.max_seq_length, settings.seed
    if isinstance(text, Conversations):
        renderer = ChatRenderer(tokenizer, assistant_only=settings.loss == "assistant")
        chats, truncated, skipped = chat_samples(text, renderer, count, length, seed)
        found = [Sample(ids, counted, number) for ids, counted in chats]
    else:
        counted = torch.ones(length, dtype=torch.bool)
        found = [Sample(ids, counted, number) for ids in token_samples(text, tokenizer, count, length, seed)]
    record = SourceRecord(
        name=source.name,
        share=float(source.share),
        samples=count,
        tokens=Samples(found).tokens,
        predictions=Samples(found).predictions,
        truncated=truncated,
        skipped=skipped,
    )
    return found, record


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Loads the checkpoint's tokenizer, never code of its own. Raises HeaprError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise HeaprError(
            f"{checkpoint.path} holds no tokenizer that transformers loads ({first_line(error)}); code of a checkpoint "
            "is never run, so it needs one of the standard kind"
        ) from error
