# SPDX-License-Identifier: Apache-2.0
"""Calibration on conversations and mixes, from the command to what is recorded, and repairs after it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from heapr_vllm.cli.main import main
from heapr_vllm.errors import HeaprError
from heapr_vllm.prune import CalibrationSettings, NeuronMoments
from heapr_vllm.prune.calibration.calibrate import calibrate
from heapr_vllm.prune.calibration.dry_run import plan
from heapr_vllm.prune.calibration.moments import MOMENTS_FILE
from heapr_vllm.prune.calibration.record import CALIBRATION_FILE, CalibrationRecord
from heapr_vllm.prune.calibration.saved_state import PARTIAL_FILE, SavedState
from heapr_vllm.prune.models.hidden_states import ActivationStore
from heapr_vllm.prune.report import reported
from heapr_vllm.prune.report.card import card_of
from heapr_vllm.prune.selection.selector import Selector
from tests.cli.test_hostile import refused
from tests.prune.text.test_batches import assert_same
from tests.prune.text.test_chats import CHATML, write_chats

NEW_FIELDS = ("packing", "text_column", "chat_template", "loss", "calibration_tokens", "loss_tokens", "sources")


@pytest.fixture(scope="module")
def mix(qwen3: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrationSettings:
    """Three samples of text and three conversations, of which the assistant's words count."""
    folder = tmp_path_factory.mktemp("mix")
    (folder / "t.jinja").write_text(CHATML)
    return CalibrationSettings(
        model=str(qwen3),
        dataset=[f"text={corpus}", f"chat={write_chats(folder / 'chats.jsonl', 12)}"],
        num_calibration_samples=6,
        max_seq_length=128,
        chat_template=str(folder / "t.jinja"),
        loss="assistant",
    )


@pytest.fixture(scope="module")
def plain(mix: CalibrationSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `mix` gives in memory, one sample at a time."""
    output = tmp_path_factory.mktemp("plain") / "calib"
    calibrate(mix, output)
    return output


@pytest.mark.parametrize("change", [{"packing": True}, {"stream": True, "packing": True}, {"batch_size": 4}])
def test_moments_do_not_depend_on_how_samples_run(
    change: dict, mix: CalibrationSettings, plain: Path, tmp_path: Path
) -> None:
    wanted = NeuronMoments.from_pretrained(plain)
    found = calibrate(replace(mix, **change), tmp_path / "c")
    assert_same(NeuronMoments.from_pretrained(tmp_path / "c"), wanted)
    for name in ("dataset_fingerprint", "calibration_tokens", "loss_tokens", "sources"):
        assert found.metadata[name] == wanted.metadata[name]


def test_what_is_recorded(mix: CalibrationSettings, plain: Path) -> None:
    record, moments = CalibrationRecord.read(plain, ""), NeuronMoments.from_pretrained(plain)
    text, chat = record.sources
    assert (text.name, text.samples, text.tokens, text.share) == ("text", 3, 3 * 128, 0.5)
    assert (chat.name, chat.samples) == ("chat", 3) and chat.tokens < 3 * 128
    assert record.calibration_tokens == moments.calibration_tokens == text.tokens + chat.tokens
    assert 3 * 127 < record.loss_tokens == moments.loss_tokens < record.calibration_tokens - 6
    assert all(tokens.sum() == 2 * record.calibration_tokens for tokens in moments.tokens.values())
    assert record.settings == mix
    block_loss = Selector(moments, "fisher").block_loss.sum().item()
    fisher = sum(layer.fisher.double().sum().item() for layer in moments.layers.values())
    assert block_loss == pytest.approx(0.5 * fisher / record.loss_tokens)


def test_gradients_are_those_of_the_assistant(mix: CalibrationSettings, tmp_path: Path) -> None:
    chats = replace(mix, dataset=mix.dataset[1], num_calibration_samples=2)
    everything, some = (calibrate(replace(chats, loss=loss), tmp_path / loss) for loss in ("all", "assistant"))
    for prefix, layer in everything.layers.items():
        assert torch.equal(layer.activation_sq, some[prefix].activation_sq)
        assert layer.gradient_sq.sum() > some[prefix].gradient_sq.sum() > 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    stream: bool, mix: CalibrationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(mix, stream=stream, packing=True)
    calibrate(settings, tmp_path / "whole", checkpoint_every=1)
    owner, left = (ActivationStore, 20) if stream else (SavedState, 2)
    real = owner.save

    def save_or_stop(self, *args, **kwargs) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        real(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, "save", save_or_stop)
        calibrate(settings, tmp_path / "c", checkpoint_every=1)
    assert (tmp_path / "c" / PARTIAL_FILE).is_file()
    for other in ({"dataset": mix.dataset[::-1]}, {"loss": "all"}, {"packing": False}):
        with pytest.raises(HeaprError, match=f"was started with another .*{next(iter(other))}.*; repeat the original"):
            calibrate(replace(settings, **other), tmp_path / "c", resume=True)
    calibrate(settings, tmp_path / "c", checkpoint_every=1, resume=True)
    assert (tmp_path / "c" / MOMENTS_FILE).read_bytes() == (tmp_path / "whole" / MOMENTS_FILE).read_bytes()


def test_files_of_before_are_read(qwen3: Path, corpus: Path, tmp_path: Path) -> None:
    """They have none of the new fields, and then moments have as many tokens as the samples that were asked for."""
    settings = CalibrationSettings(model=str(qwen3), dataset=str(corpus), num_calibration_samples=4, max_seq_length=32)
    calibrate(settings, tmp_path / "c")
    path = tmp_path / "c" / CALIBRATION_FILE
    old = {name: value for name, value in json.loads(path.read_text()).items() if name not in NEW_FIELDS}
    path.write_text(json.dumps({**old, "calibration_tokens": 4 * 32}))
    assert CalibrationRecord.read(tmp_path / "c", "").settings == settings
    with safe_open(tmp_path / "c" / MOMENTS_FILE, framework="pt") as file:
        metadata = json.loads(file.metadata()["heapr"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = {name: value for name, value in metadata.items() if name not in NEW_FIELDS}
    save_file(tensors, tmp_path / "c" / MOMENTS_FILE, metadata={"heapr": json.dumps(metadata)})
    moments = NeuronMoments.from_pretrained(tmp_path / "c")
    assert moments.calibration_tokens == moments.loss_tokens == 4 * 32
    written = (tmp_path / "c" / MOMENTS_FILE).read_bytes()
    calibrate(settings, tmp_path / "c", resume=True)
    assert (tmp_path / "c" / MOMENTS_FILE).read_bytes() == written, "a finished run is left as it is"


def test_a_dry_run_counts_tokens(mix: CalibrationSettings, plain: Path) -> None:
    sizes = plan(replace(mix, stream=True))
    assert sizes["calibration_tokens"] == CalibrationRecord.read(plain, "").calibration_tokens
    assert plan(mix)["calibration_tokens"] == 6 * 128, "at most: the text is not read"


def test_from_the_command_to_a_repair(mix: CalibrationSettings, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text, chat = (spec.partition("=")[2] for spec in mix.dataset)
    arguments = ["--max-seq-length", "128", "--chat-template", str(mix.chat_template), "--loss", "assistant"]
    mixed = ["--dataset", f"text={text}:0.5", f"chat={chat}:0.25", "--dataset", f"more={text}:0.25"]
    calib, masks, pruned = (str(tmp_path / name) for name in ("calib", "masks", "pruned"))
    command = ["calibrate", mix.model, *mixed, *arguments, "--num-calibration-samples", "8", "--packing"]
    assert main([*command, "-o", calib]) == 0
    printed = capsys.readouterr().out
    assert (
        "text: 4 samples, 512 tokens\n" in printed and "chat: 2 samples, " in printed and "more: 2 samples" in printed
    )
    assert main([*command, "-o", calib, "--resume"]) == 0
    assert main(["prune", calib, "--sparsity", "0.5", "-o", masks]) == 0
    assert main(["export", masks, "--repair", "least-squares", "-o", pruned]) == 0
    for card in (tmp_path / "masks" / "README.md", tmp_path / "pruned" / "README.md"):
        written = card.read_text()
        assert "tokens of text, chat, more, seed 0 |" in written and str(Path(text).parent) not in written
    assert str(Path(chat).parent) not in written and written.count("tokens of text, chat, more, ") == 2, "the repair's"
    capsys.readouterr()
    evaluate = ["eval", mix.model, pruned, "--dataset", f"chat={chat}", *arguments, "--num-samples", "3", "--json"]
    assert main(evaluate) == 0
    base, small = json.loads(capsys.readouterr().out)["models"]
    assert base["perplexity"] > 1 and small["executed_reduction"] > 0


def test_sources_are_kept_apart(mix: CalibrationSettings, plain: Path, tmp_path: Path) -> None:
    """The sums of a source are those of a calibration on it alone; together they are those of the whole."""
    both = NeuronMoments.from_pretrained(plain)
    assert list(both.sources) == ["text", "chat"]
    for name, spec in zip(both.sources, mix.dataset, strict=True):
        loss = "assistant" if name == "chat" else "all"
        settings = replace(mix, dataset=spec, loss=loss, num_calibration_samples=3)
        calibrate(settings, tmp_path / name)
        assert_same(NeuronMoments(both.sources[name], {}), NeuronMoments.from_pretrained(tmp_path / name))
    for prefix, layer in both.layers.items():
        parts = [layers[prefix] for layers in both.sources.values()]
        assert torch.equal(layer.tokens, parts[0].tokens + parts[1].tokens)
        assert torch.equal(layer.fisher, parts[0].fisher + parts[1].fisher)
        assert torch.equal(layer.peak_norm, torch.maximum(parts[0].peak_norm, parts[1].peak_norm))
        assert torch.equal(layer.down_norm, parts[0].down_norm)


def test_norms_are_stored_once_and_one_source_as_before(plain: Path, calibration: Path) -> None:
    with safe_open(plain / MOMENTS_FILE, framework="pt") as file:
        names = set(file.keys())
        assert json.loads(file.metadata()["heapr"])["format_version"] == 3
    prefix = "model.layers.0.mlp.experts"
    assert {f"text/{prefix}.fisher", f"chat/{prefix}.fisher", f"{prefix}.down_norm"} < names
    assert f"text/{prefix}.down_norm" not in names and f"{prefix}.fisher" not in names
    with safe_open(calibration / MOMENTS_FILE, framework="pt") as file:
        assert json.loads(file.metadata()["heapr"])["format_version"] == 2
    assert list(NeuronMoments.from_pretrained(calibration).sources) == ["all"]
    one = NeuronMoments.from_pretrained(calibration)
    assert one.mixed({"all": 1.0}) is one


def test_mixes_are_weighed_per_token(plain: Path) -> None:
    moments = NeuronMoments.from_pretrained(plain)
    text, chat = CalibrationRecord.read(plain, "").sources
    total = text.tokens + chat.tokens
    same = moments.mixed({"text": text.tokens / total, "chat": chat.tokens / total})
    assert_same(same, moments)
    assert same.loss_tokens == moments.loss_tokens and same.calibration_tokens == total
    mixed = moments.mixed({"chat": 0.7, "text": 0.3})
    for prefix, layer in mixed.layers.items():
        a, b = (moments.sources[name][prefix] for name in ("text", "chat"))
        for name in ("activation_sq", "gradient_sq", "fisher", "routed_norm"):
            wanted = total * (0.3 * getattr(a, name) / text.tokens + 0.7 * getattr(b, name) / chat.tokens)
            torch.testing.assert_close(getattr(layer, name), wanted, rtol=1e-5, atol=0)
        counts = total * (0.3 * a.tokens.double() / text.tokens + 0.7 * b.tokens.double() / chat.tokens)
        assert (layer.tokens - counts).abs().max() <= 1 and torch.equal(layer.tokens > 0, counts > 0)
        assert torch.equal(layer.down_norm, a.down_norm)
    alone = moments.mixed({"chat": 1.0})
    scale = total / chat.tokens
    for prefix, layer in alone.layers.items():
        chats = moments.sources["chat"][prefix]
        torch.testing.assert_close(layer.fisher, chats.fisher * scale, rtol=1e-5, atol=0)
        assert torch.equal(layer.peak_norm, chats.peak_norm), "what does not count is not protected either"


def test_masks_of_a_mix(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prune = ["prune", str(plain), "--sparsity", "0.5", "--criterion", "fisher"]
    assert main([*prune, "-o", str(tmp_path / "as-is")]) == 0
    assert main([*prune, "--mix", "chat=0.9,text=0.1", "-o", str(tmp_path / "chat")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("by source, in nats per token of its own: text ") == 2
    assert "chosen for the mix chat 90%, text 10%" in printed
    found = {}
    for name in ("as-is", "chat"):
        assert main(["inspect", str(tmp_path / name), "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert found["chat"]["metadata"]["mix"] == {"chat": 0.9, "text": 0.1} and "mix" not in found["as-is"]["metadata"]
    losses = {name: report["frontier"]["sources"] for name, report in found.items()}
    assert losses["chat"]["chat"] < losses["as-is"]["chat"] and losses["chat"]["text"] > losses["as-is"]["text"]
    mixed = NeuronMoments.from_pretrained(plain).mixed({"chat": 0.9, "text": 0.1})
    record = CalibrationRecord.read(tmp_path / "chat" / "heapr", "")
    assert record.tokens == {prefix: tokens.tolist() for prefix, tokens in mixed.tokens.items()}
    assert record.mix == {"chat": 0.9, "text": 0.1} and found["chat"]["executed_reduction"] > 0
    card = (tmp_path / "chat" / "README.md").read_text()
    assert card == card_of(tmp_path / "chat") and "- chosen for the mix chat 90%, text 10%\n" in card
    assert f"| -{found['chat']['executed_reduction']:.1%} |" in card
    page = reported.ReportedModel.read(tmp_path / "chat", "chat")
    assert "chosen for the mix chat 90%, text 10%" in page.notes
    assert any(note.startswith("by source, in nats per token of its own: text ") for note in page.notes)
    assert main(["sweep", str(plain), "--mix", "chat=1", "--criterion", "fisher", "--ratios", "0.5"]) == 0


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("chat=0.9,code=0.1", "the moments have no source code, only text, chat; choose among them"),
        ("chat=0.9", "the shares of the sources add up to 0.9; change them so that it is 1"),
        ("chat=1.5,text=-0.5", "the share of chat is 1.5; give it one from 0 to 1"),
        ("chat", "--mix chat is not like code=0.7,chat=0.3; name sources and shares"),
        ("chat=nan", "the share of chat is nan"),
    ],
)
def test_bad_mixes(shares: str, message: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["prune", str(plain), "--sparsity", "0.5", "--mix", shares, "-o", str(tmp_path / "masks")]
    refused(command, message, capsys, plain)


def test_a_mix_of_one_text(calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["prune", str(calibration), "--sparsity", "0.5", "--mix", "code=1", "-o", str(tmp_path / "masks")]
    refused(command, "have no source code, only all; choose among them, or calibrate on several", capsys, calibration)
