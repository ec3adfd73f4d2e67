# SPDX-License-Identifier: Apache-2.0
"""Mixes: specs with names and shares, and how samples are shared out."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune.text.sources import Source, parse_sources, share_out

HUB = "wikitext[wikitext-2-raw-v1](train)"


def test_names_specs_and_shares() -> None:
    found = parse_sources(["code=a/code.jsonl:0.5", "chats.jsonl.gz:0.3", f"{HUB}:.2"])
    assert [(source.name, source.spec, float(source.share)) for source in found] == [
        ("code", "a/code.jsonl", 0.5),
        ("chats", "chats.jsonl.gz", 0.3),
        ("wikitext", HUB, 0.2),
    ]


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("a.txt", "a"),
        ("folder/my chats (1).jsonl", "my_chats_1_"),
        ("text.v2.json.gz", "text.v2"),
        ("org/wiki[raw-v1](validation)", "wiki"),
        ("org/wiki", "wiki"),
        ("wiki:it.txt", "wiki_it"),
    ],
)
def test_one_plain_spec_is_the_whole_text(spec: str, name: str) -> None:
    assert parse_sources(spec) == parse_sources([spec]) == [Source(name, spec, Fraction(1))]


def test_a_file_that_exists_is_its_path(tmp_path: Path) -> None:
    path = tmp_path / "a=b.txt:1"
    path.write_text("x")
    assert parse_sources(str(path))[0].spec == str(path)


def test_without_shares_all_are_equal() -> None:
    assert [source.share for source in parse_sources(["a.txt", "b.txt", "c.txt"])] == [Fraction(1, 3)] * 3
    assert share_out(parse_sources(["a.txt", "b.txt", "c.txt"]), 8) == [3, 3, 2]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "no dataset is named; say which"),
        ([""], "a dataset spec is empty; write a file"),
        (["a.txt:0.5", "b.txt:0.4"], "add up to 0.9; change them so that it is 1"),
        (["a.txt:0.5", "b.txt:0.500002"], "add up to 1.000002; change them"),
        (["a.txt:1", "b.txt:0"], r"the share of b.txt is 0; give it more than 0, or leave the source out"),
        (["a.txt:1.5", "b.txt:-0.5"], "the share of b.txt is -0.5; give it"),
        (["a.txt:nan"], "the share of a.txt is nan; give it"),
        (["a.txt:inf"], "the share of a.txt is inf; give it"),
        (["a.txt:1", "b.txt:1e-12"], "the share of b.txt is 1e-12, less than"),
        (["a.txt:0.5", "b.txt"], "source b has no share, but others have; write SPEC:SHARE for all"),
        (["a.txt", "x/a.jsonl"], "two sources are called a; give each a name of its own: NAME=SPEC"),
        (["n=a.txt", "n=b.txt"], "two sources are called n;"),
    ],
)
def test_bad_mixes(specs: list[str], message: str) -> None:
    with pytest.raises(HeaprError, match=message):
        parse_sources(specs)


def test_a_source_that_gets_nothing() -> None:
    with pytest.raises(HeaprError, match="source b gets none of 4 samples; ask for 20 or more"):
        share_out(parse_sources(["a.txt:0.95", "b.txt:0.05"]), 4)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(1, 10_000))
def test_samples_are_shared_out_exactly(weights: list[int], num_samples: int) -> None:
    total = sum(weights)
    sources = [Source(str(number), "", Fraction(weight, total)) for number, weight in enumerate(weights)]
    try:
        counts = share_out(sources, num_samples)
    except HeaprError:
        assert min(weights) * num_samples < total
        return
    assert sum(counts) == num_samples and min(counts) >= 1
    assert all(abs(count - source.share * num_samples) < 1 for count, source in zip(counts, sources, strict=True))


@given(st.lists(st.from_regex(r"[a-z]{1,8}", fullmatch=True), min_size=1, max_size=5, unique=True), st.data())
def test_what_is_written_is_what_is_read(names: list[str], data: st.DataObject) -> None:
    weights = [data.draw(st.integers(1, 99)) for _ in names]
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    found = parse_sources([f"{name}=x/{name}.md:{float(share)}" for name, share in zip(names, shares, strict=True)])
    assert [source.name for source in found] == names
    assert [source.spec for source in found] == [f"x/{name}.md" for name in names]
    assert all(abs(source.share - share) < 1e-6 for source, share in zip(found, shares, strict=True))
