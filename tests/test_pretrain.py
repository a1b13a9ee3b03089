# SPDX-License-Identifier: Apache-2.0
"""slope-pretrain: data, models, training, resume and outputs, on two-layer models."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import slope_ext as slope
from slope_ext.recipes import UsageError, pretrain
from slope_ext.recipes.arguments import build_parser, parse_arguments
from slope_ext.recipes.checkpoint import find_checkpoint, load_state
from slope_ext.recipes.data import (
    Blocks,
    end_of_text_id,
    load_tokenizer,
    open_source,
    split_documents,
    tokenize_corpus,
    train_tokenizer,
)
from slope_ext.recipes.models import SIZES, build_model, decay_groups, model_config
from slope_ext.recipes.pretrain import learning_rate, main
from slope_ext.recipes.reporting import dense_checkpoint_bytes, sparsity

for package in ("transformers", "tokenizers", "tqdm", "matplotlib"):
    pytest.importorskip(package)
load_file = pytest.importorskip("safetensors.torch").load_file

WORDS = ["the", "a", "cat", "bird", "tree", "sat", "saw", "flew", "on", "over", "by", "night"]
CONFIGS = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "opt": {
        "model_type": "opt",
        "hidden_size": 32,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}


def document(seed: int, words: int = 400) -> str:
    choose = random.Random(seed).choices
    return " ".join(choose(WORDS, k=words)) + "\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of eight documents in text/ and a config per model family."""
    directory = tmp_path_factory.mktemp("inputs")
    (directory / "text").mkdir()
    for i in range(8):
        (directory / "text" / f"{i}.txt").write_text(document(i))
    for name, config in CONFIGS.items():
        (directory / f"{name}.json").write_text(json.dumps(config))
    return directory


def arguments(inputs: Path, output: Path, *options: object, family: str = "llama") -> list[str]:
    """A run of 12 steps; later options override earlier ones."""
    base = {
        "--model": inputs / f"{family}.json",
        "--data": inputs / "text",
        "--output-dir": output,
        "--vocab-size": 300,
        "--seq-len": 16,
        "--batch-size": 2,
        "--grad-accum": 2,
        "--steps": 12,
        "--warmup-steps": 2,
        "--lr": 0.01,
        "--adapter-rank": 4,
        "--adapter-fraction": 0.25,  # the switch: from step 10
        "--mask-interval": 3,
        "--save-interval": 5,
        "--eval-interval": 6,
        "--eval-batches": 2,
        "--sample-tokens": 8,
    }
    return [str(x) for pair in base.items() for x in pair] + [str(x) for x in options]


def records(output: Path, kind: str = "train") -> list[dict]:
    lines = (output / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(output: Path) -> list[float]:
    assert [record["step"] for record in records(output)] == list(
        range(1, len(records(output)) + 1)
    )
    return [record["loss"] for record in records(output)]


def newest(output: Path) -> Path:
    path = find_checkpoint(output / "checkpoints")
    assert path is not None
    return path


def assert_same_run(one: Path, other: Path) -> None:
    """Equal to the bit: logged losses, validation losses, weights and optimizer state."""
    assert losses(one) == losses(other)
    assert records(one, "valid") == records(other, "valid")
    assert records(one, "adapters") == records(other, "adapters")
    weights, expected = (load_file(newest(o) / "model.safetensors") for o in (one, other))
    assert weights.keys() == expected.keys()
    for name in weights:
        assert torch.equal(weights[name], expected[name]), name
    states = [load_state(newest(o))["optimizer"]["state"] for o in (one, other)]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name])), name


@pytest.fixture(scope="module", params=["dense", "slope"])
def undisturbed(
    request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The method and the output directory of an undisturbed run of 12 steps."""
    output = tmp_path_factory.mktemp(request.param)
    assert main(arguments(inputs, output, "--method", request.param)) == 0
    return request.param, output


# ---- data ----------------------------------------------------------------------------------------


def test_split_is_by_document_and_deterministic(inputs: Path) -> None:
    source = open_source(str(inputs / "text"))
    train, valid, note = split_documents(source, 0.3)
    texts = [document(i) for i in range(8)]
    assert sorted([*train(), *valid()]) == sorted(texts)
    assert not set(train()) & set(valid())
    assert list(train()) == list(split_documents(source, 0.3)[0]())
    assert str(len(list(valid()))) in note
    # A larger share only moves documents from training to validation.
    assert set(valid()) <= set(split_documents(source, 0.6)[1]())


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_each_side_of_the_split_has_a_document(inputs: Path, fraction: float) -> None:
    for pattern in ("text", "text/[01].txt"):
        train, valid, _ = split_documents(open_source(str(inputs / pattern)), fraction)
        assert list(train())
        assert list(valid())


def test_equal_documents_are_still_split(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("same")
    train, valid, _ = split_documents(open_source(str(tmp_path)), 0.5)
    assert (list(train()), list(valid())) == (["same"], ["same"])


def test_single_document_is_cut_by_position(tmp_path: Path) -> None:
    lines = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "one.txt").write_text(lines)
    train, valid, note = split_documents(open_source(str(tmp_path / "one.txt")), 0.1)
    assert "".join([*train(), *valid()]) == lines
    assert next(train()).endswith("\n")
    assert len(next(valid())) == pytest.approx(0.1 * len(lines), abs=10)
    assert "single document" in note


def test_json_lines_and_a_given_split(tmp_path: Path) -> None:
    for name, texts in (("train", ["a", "b\ud800", " "]), ("valid", ["c"])):
        lines = [json.dumps({"text": text, "source": "x"}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n\n")
    train, valid, _ = split_documents(open_source(str(tmp_path)), 0.5)
    assert (list(train()), list(valid())) == (["a", "b?"], ["c"])
    assert list(open_source(str(tmp_path / "train.jsonl")).documents()) == ["a", "b?", " "]


def test_hugging_face_names_need_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"--data hf:x: needs the package datasets"):
        next(open_source("hf:x").documents())


def test_hugging_face_name_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list):
        column_names = ("text",)

    def load_dataset(name: str, config: str | None, split: str) -> Rows:
        if name == "missing":
            raise FileNotFoundError("no dataset\nand so on")
        if name == "silent":
            raise ConnectionError
        texts = ("a", None) if name == "null" else (name, str(config), split)
        return Rows({"text": text} for text in texts)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for spec, expected in (
        ("hf:a/b", ["a/b", "None", "train"]),
        ("hf:a:c", ["a", "c", "train"]),
        ("hf:a::s", ["a", "None", "s"]),
        ("hf:a:c:s", ["a", "c", "s"]),
    ):
        documents = open_source(spec).documents
        assert list(documents()) == list(documents()) == expected
    with pytest.raises(UsageError, match=r"^--data hf:missing: no dataset$"):
        next(open_source("hf:missing").documents())
    with pytest.raises(UsageError, match=r"^--data hf:silent: ConnectionError$"):
        next(open_source("hf:silent").documents())
    with pytest.raises(UsageError, match=r'^--data hf:null: row 1 has no "text" string$'):
        list(open_source("hf:null").documents())
    for spec in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(UsageError, match="not of the form"):
            next(open_source(spec).documents())


def test_tokenizer_round_trip(inputs: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer([document(0)], 300)
    assert tokenizer.get_vocab_size() <= 300
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    for text in (document(1), "Zoë 漢字 🙂\n\ttab", ""):
        assert loaded.decode(loaded.encode(text).ids) == text


def test_tokens_are_the_documents_each_with_an_end(inputs: Path, tmp_path: Path) -> None:
    arguments = (str(inputs / "text"), 0.3, "train", 300)
    corpus = tokenize_corpus(tmp_path, *arguments)
    corpus.keep()
    train, valid, _ = split_documents(open_source(arguments[0]), 0.3)
    end = end_of_text_id(corpus.tokenizer)
    for tokens, documents in ((corpus.train, train), (corpus.valid, valid)):
        assert tokens.dtype == np.uint16
        parts = np.split(tokens, np.flatnonzero(tokens == end) + 1)
        assert [corpus.tokenizer.decode(part[:-1].tolist()) for part in parts[:-1]] == list(
            documents()
        )
        assert len(parts[-1]) == 0
    written = (tmp_path / "tokens" / "train.bin").stat().st_mtime_ns
    again = tokenize_corpus(tmp_path, *arguments)
    assert (again.digest, again.note) == (corpus.digest, corpus.note)
    assert (tmp_path / "tokens" / "train.bin").stat().st_mtime_ns == written


@pytest.mark.parametrize("named", ["folder", "file"])
def test_tokens_are_made_anew_for_another_tokenizer(
    inputs: Path, tmp_path: Path, named: str
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    spec = str(given if named == "folder" else given / "tokenizer.json")
    digests = []
    for text in (document(0), document(1), document(1)):
        train_tokenizer([text], 280).save(str(given / "tokenizer.json"))
        corpus = tokenize_corpus(tmp_path / "run", str(inputs / "text"), 0.3, spec, 0)
        corpus.keep()
        assert corpus.tokenizer.to_str() == load_tokenizer(str(given)).to_str()
        digests.append(corpus.digest)
    assert digests[0] != digests[1] == digests[2]


def test_block_order() -> None:
    blocks = Blocks(np.arange(107, dtype=np.uint16), seq_len=4, seed=3)
    assert blocks.count == 21
    epochs = [[blocks.block_index(21 * e + i) for i in range(21)] for e in range(3)]
    assert all(sorted(order) == list(range(21)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    batch = blocks.batch(0, 2)
    assert batch.dtype == torch.int64
    assert batch.tolist() == [list(range(5 * b, 5 * b + 5)) for b in epochs[0][:2]]
    other_seed = Blocks(np.arange(107, dtype=np.uint16), seq_len=4, seed=4)
    assert [other_seed.block_index(i) for i in range(21)] != epochs[0]
    unshuffled = Blocks(np.arange(107, dtype=np.uint16), seq_len=4)
    assert unshuffled.batch(0, 21).flatten().tolist() == list(range(105))


def test_block_order_does_not_depend_on_the_start() -> None:
    tokens = np.arange(107, dtype=np.uint16)
    from_start = Blocks(tokens, 4, seed=0)
    whole = torch.cat([from_start.batch(3 * i, 3) for i in range(20)])
    resumed = Blocks(tokens, 4, seed=0)
    assert torch.equal(torch.cat([resumed.batch(3 * i, 3) for i in range(13, 20)]), whole[39:])


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_families_build(inputs: Path, family: str) -> None:
    config = model_config(str(inputs / f"{family}.json"), vocab_size=300, end_of_text=7, seq_len=16)
    model = build_model(config, torch.float32, gradient_checkpointing=False)
    assert model.config._attn_implementation == "sdpa"
    logits = model(input_ids=torch.zeros(2, 16, dtype=torch.long)).logits
    assert logits.shape == (2, 16, 300)
    matrices, vectors = decay_groups(model, 0.1, decay_embeddings=False)
    assert all(p.ndim == 2 for p in matrices["params"])
    assert any(p.shape == (300, 32) for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))
    everything = decay_groups(model, 0.1, decay_embeddings=True)
    assert all(p.ndim == 1 for p in everything[1]["params"])


@pytest.mark.parametrize("name", SIZES)
def test_sizes_have_the_parameters_that_they_are_called_by(name: str) -> None:
    vocab_size = {"llama": 32000, "mistral": 32000, "opt": 50272, "gpt2": 50257}
    vocab = vocab_size[SIZES[name]["model_type"]]
    config = model_config(name, 128256 if name == "llama-3-8b" else vocab, 0, 1024)
    with torch.device("meta"):
        model = build_model(config, torch.bfloat16, gradient_checkpointing=False)
    count = sum(parameter.numel() for parameter in model.parameters())
    expected = {
        "llama-25m": 26.4e6,
        "llama-100m": 110e6,
        "llama-2-7b": 6.74e9,
        "llama-2-13b": 13.0e9,
        "llama-3-8b": 8.03e9,
        "mistral-7b": 7.24e9,
        "opt-125m": 125e6,
        "opt-350m": 331e6,
        "opt-1.3b": 1.316e9,
        "opt-2.7b": 2.65e9,
        "opt-6.7b": 6.66e9,
        "opt-13b": 12.85e9,
        "opt-30b": 29.97e9,
        "opt-66b": 65.7e9,
        "gpt2": 124.4e6,
        "gpt2-medium": 354.8e6,
        "gpt2-large": 774e6,
        "gpt2-xl": 1557.6e6,
    }
    if name in expected:
        assert count == pytest.approx(expected[name], rel=0.01)


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_loss_falls(inputs: Path, tmp_path: Path, family: str) -> None:
    options = ("--steps", 40, "--save-interval", 100, "--method", "slope")
    assert main(arguments(inputs, tmp_path, *options, family=family)) == 0
    run = losses(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert run[0] == pytest.approx(summary["ln_vocab"], abs=0.6)
    assert sum(run[-5:]) / 5 < run[0] - 1
    assert summary["valid_loss"] < run[0] - 1


@pytest.mark.parametrize("stop", [7, 9, 11], ids=["before", "at", "after"])
def test_resume_is_exact(
    undisturbed: tuple[str, Path], inputs: Path, tmp_path: Path, stop: int
) -> None:
    """``stop`` lies on either side of the adapters' switch, which is before step 10."""
    method, expected = undisturbed
    options = arguments(inputs, tmp_path, "--method", method)
    assert main([*options, "--stop-after", str(stop)]) == 0
    assert len(losses(tmp_path)) == stop
    assert main(options) == 0
    assert_same_run(tmp_path, expected)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_resume_is_exact_with_dropout(inputs: Path, tmp_path: Path, family: str) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert main(arguments(inputs, one, family=family)) == 0
    assert main(arguments(inputs, other, "--stop-after", 6, family=family)) == 0
    assert main(arguments(inputs, other, family=family)) == 0
    assert_same_run(other, one)


def test_adapters_join_late(undisturbed: tuple[str, Path]) -> None:
    method, output = undisturbed
    switches = [record["step"] for record in records(output, "adapters")]
    assert switches == ([10] if method == "slope" else [])
    names = load_file(newest(output) / "model.safetensors").keys()
    assert any("lora_A" in name for name in names) == (method == "slope")


def test_options_that_change_the_computation_run(inputs: Path, tmp_path: Path) -> None:
    common = ("--steps", 3, "--warmup-steps", 0)
    for i, options in enumerate(
        [
            ("--dtype", "bfloat16", "--master-weights"),
            ("--dtype", "bfloat16", "--half-moments"),
            ("--autocast", "--gradient-checkpointing"),
            ("--backward-copy", "recompute", "--mask", "random", "--adapter-rank", 0),
            ("--grad-clip", 0, "--decay-embeddings"),
        ]
    ):
        output = tmp_path / str(i)
        assert main(arguments(inputs, output, *common, *options)) == 0
        assert all(math.isfinite(loss) for loss in losses(output))


def test_learning_rate_schedule() -> None:
    args = parse_arguments(
        ["--steps", "100", "--warmup-steps", "10", "--lr", "1", "--min-lr-ratio", "0.2"]
    )
    rates = [learning_rate(step, args) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[54] == pytest.approx(0.6)
    assert rates[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(rates[9:]))


def test_gradients_are_clipped_alike_by_every_optimizer() -> None:
    model = torch.nn.Linear(8, 8)
    twin = copy.deepcopy(model)
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    ours = slope.optim.AdamW(model.parameters(), **options)
    theirs = torch.optim.AdamW(twin.parameters(), **options)
    x = torch.randn(5, 8)
    for scale in (100.0, 1e-3):
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            (scale * net(x)).square().sum().backward()
        norm = pretrain.clip_gradients(model, ours, 0.5)
        assert norm == pytest.approx(pretrain.clip_gradients(twin, theirs, 0.5))
        ours.step()
        theirs.step()
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, other)


def test_not_a_number_stops_the_run(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--lr", "1e30", "--grad-clip", 0, "--warmup-steps", 0)
    assert main(arguments(inputs, tmp_path, *options)) == 1
    assert "--lr" in capsys.readouterr().err


# ---- interruption --------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_exits(
    inputs: Path,
    tmp_path: Path,
    undisturbed: tuple[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    method, expected = undisturbed
    options = arguments(inputs, tmp_path, "--method", method)

    class Interrupting(pretrain.Progress):
        def update(self, record: dict) -> None:
            super().update(record)
            if record["step"] == 3:
                signal.raise_signal(number)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "Progress", Interrupting)
        assert main(options) == code
    assert signal.getsignal(number) is handler
    assert "step 3 of 12" in capsys.readouterr().out
    assert newest(tmp_path).name == "step-000003"
    assert main(options) == 0
    assert_same_run(tmp_path, expected)


@pytest.mark.slow
def test_killed_run_resumes_exactly(inputs: Path, tmp_path: Path) -> None:
    killed, expected = tmp_path / "killed", tmp_path / "expected"
    options = ("--steps", 60, "--save-interval", 10, "--eval-interval", 25)
    environment = {**os.environ, "PYTHONPATH": str(Path(slope.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-m", pretrain.__name__, *arguments(inputs, killed, *options)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        log, deadline = killed / "log.jsonl", time.monotonic() + 60
        while not log.exists() or log.read_bytes().count(b"\n") < 27:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 10 <= int(newest(killed).name.removeprefix("step-")) < 60
    assert main(arguments(inputs, killed, *options)) == 0
    assert main(arguments(inputs, expected, *options)) == 0
    assert_same_run(killed, expected)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "[]", "{}"])
def test_damaged_newest_checkpoint_is_skipped(
    inputs: Path, tmp_path: Path, undisturbed: tuple[str, Path], damage: str
) -> None:
    method, expected = undisturbed
    options = arguments(inputs, tmp_path, "--method", method)
    assert main([*options, "--stop-after", "8"]) == 0
    file = newest(tmp_path) / ("model.safetensors" if damage == "flip" else "training_state.pt")
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage in ("[]", "{}"):
        (newest(tmp_path) / "checksums.json").write_text(damage)
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[-5] ^= 1
        file.write_bytes(content)
    (tmp_path / "checkpoints" / "tmp-000011").mkdir()
    with pytest.warns(UserWarning, match=r"skipping the checkpoint .*step-000008"):
        assert main(options) == 0
    assert_same_run(tmp_path, expected)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("enforce fail at inline_container.cc"), OSError(28, "No space left")],
)
def test_a_full_disk_loses_no_checkpoint(
    inputs: Path,
    tmp_path: Path,
    undisturbed: tuple[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    method, expected = undisturbed
    options = arguments(inputs, tmp_path, "--method", method)
    assert main([*options, "--stop-after", "8"]) == 0
    before = newest(tmp_path)

    def refuse(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", refuse)
        assert main(options) == 2
    assert re.search(
        "slope-pretrain: error: --output-dir: .*(enforce fail|No space)", capsys.readouterr().err
    )
    assert newest(tmp_path) == before
    assert not list((tmp_path / "checkpoints").glob("tmp-*"))
    assert main(options) == 0
    assert_same_run(tmp_path, expected)


def test_log_cut_short_is_mended(
    inputs: Path, tmp_path: Path, undisturbed: tuple[str, Path]
) -> None:
    method, expected = undisturbed
    options = arguments(inputs, tmp_path, "--method", method)
    assert main([*options, "--stop-after", "5"]) == 0
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('null\n{"kind": "train", "step": 6, "loss": 1.0}\n{"kind": "trai')
    assert main(options) == 0
    assert_same_run(tmp_path, expected)


def test_resume_from_a_path_and_never(
    inputs: Path, tmp_path: Path, undisturbed: tuple[str, Path]
) -> None:
    method, expected = undisturbed
    options = arguments(inputs, tmp_path, "--method", method)
    five = expected / "checkpoints" / "step-000010"
    assert main([*options, "--resume", str(five)]) == 0
    assert [record["step"] for record in records(tmp_path)] == [11, 12]
    assert main([*options, "--resume", "never"]) == 0
    assert_same_run(tmp_path, expected)


def test_resume_from_an_older_checkpoint_drops_the_later_ones(
    inputs: Path,
    tmp_path: Path,
    undisturbed: tuple[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method, expected = undisturbed
    options = arguments(inputs, tmp_path, "--method", method)
    assert main(options) == 0
    older = str(tmp_path / "checkpoints" / "step-000010")
    capsys.readouterr()
    assert main([*options, "--resume", older, "--stop-after", "11"]) == 0
    assert "without --stop-after and with --resume auto resumes" in capsys.readouterr().out
    assert newest(tmp_path).name == "step-000011"
    assert Path(older).exists()
    assert main(options) == 0
    assert_same_run(tmp_path, expected)

    # One that was left and is killed before it saves: its later steps are not found again
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "train", killed)
    left = tmp_path / "checkpoints" / "step-000011"
    assert main([*options, "--resume", str(left)]) == 130
    assert newest(tmp_path) == left
    # Nor is any of this run, where it was to go on from another's
    others = expected / "checkpoints" / "step-000010"
    assert main([*options, "--resume", str(others)]) == 130
    assert find_checkpoint(tmp_path / "checkpoints") is None
    assert len(list((tmp_path / "checkpoints").glob("aside-step-*"))) == 2


@pytest.mark.parametrize("summary", ["whole", "cut", "none"])
def test_complete_run_reports_again(
    inputs: Path, undisturbed: tuple[str, Path], capsys: pytest.CaptureFixture[str], summary: str
) -> None:
    method, output = undisturbed
    before, file = (output / "log.jsonl").read_bytes(), output / "summary.json"
    whole = file.read_bytes()
    if summary == "cut":
        file.write_bytes(whole[:100])
    elif summary == "none":
        file.unlink()
    assert main(arguments(inputs, output, "--method", method)) == 0
    printed = capsys.readouterr().out
    assert ("is complete" in printed) == (summary == "whole")
    assert "ln(vocab)" in printed
    assert (output / "log.jsonl").read_bytes() == before
    assert file.read_bytes() == whole


def test_a_run_complete_elsewhere_is_not_reported(
    inputs: Path,
    tmp_path: Path,
    undisturbed: tuple[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    method, output = undisturbed
    last = str(newest(output))
    assert main(arguments(inputs, tmp_path, "--method", method, "--resume", last)) == 2
    assert f"--resume {last}: that run is complete" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", 1),
        ("--lr", 0.02),
        ("--steps", 13),
        ("--seq-len", 8),
        ("--mask", "random"),
        ("--method", "dense"),
        ("--data", "demo"),
    ],
)
def test_resume_with_other_arguments_is_refused(
    inputs: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: object,
) -> None:
    output = tmp_path_factory.getbasetemp() / "refused"
    if not output.exists():
        assert main(arguments(inputs, output, "--stop-after", 2)) == 0
    capsys.readouterr()
    assert main(arguments(inputs, output, option, value)) == 2
    assert f"error: {option} {value}" in capsys.readouterr().err


@pytest.mark.parametrize("same_size", [False, True])
def test_resume_with_changed_text_is_refused(
    same_size: bool, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(document(0))
    options = arguments(inputs, tmp_path / "run", "--data", text, "--valid-fraction", 0.2)
    assert main([*options, "--stop-after", "2"]) == 0
    text.write_text(document(0).swapcase() if same_size else document(1))
    assert main(options) == 2
    assert f"--data {text}: its text changed" in capsys.readouterr().err


def test_what_cannot_start_deletes_nothing(
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = arguments(inputs, tmp_path, "--steps", 4, "--save-interval", 2)
    assert main(options) == 0
    checkpoints = tmp_path / "checkpoints"
    precious = checkpoints / "step-best" / "notes.txt"
    precious.parent.mkdir()
    precious.write_text("mine")

    def contents() -> dict[Path, bytes]:
        files = (file for file in tmp_path.rglob("*") if file.is_file())
        return {file: file.read_bytes() for file in files if "tokens.new" not in file.parts}

    before = contents()
    for option, value in (("--data", "corpuz"), ("--model", "llamma"), ("--seq-len", 10**6)):
        assert main([*options, "--resume", "never", "--vocab-size", "280", option, str(value)]) == 2
        assert option in capsys.readouterr().err
        assert contents() == before
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        assert main([*options, "--resume", "never", "--tensorboard"]) == 2
    assert "--tensorboard: needs" in capsys.readouterr().err
    assert contents() == before
    assert main([*options, "--resume", "never", "--stop-after", "1"]) == 0
    assert newest(tmp_path).name == "step-000001"
    assert not (tmp_path / "summary.json").exists()
    assert precious.read_text() == "mine"


def test_checkpoints_that_are_all_damaged_are_kept(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = arguments(inputs, tmp_path, "--save-interval", 2, "--stop-after", 4)
    assert main(options) == 0
    files = sorted((tmp_path / "checkpoints").rglob("model.safetensors"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes() + b"!")
    log = (tmp_path / "log.jsonl").read_bytes()
    with pytest.warns(UserWarning, match="skipping the checkpoint"):
        assert main(options) == 2
    assert "none of the checkpoints in" in capsys.readouterr().err
    assert all(file.exists() for file in files)
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_resume_with_a_changed_config_is_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((inputs / "llama.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    options = arguments(inputs, tmp_path / "run", "--model", file)
    assert main([*options, "--stop-after", "2"]) == 0
    for change in ({"hidden_act": "relu"}, {"hidden_size": 64}):
        file.write_text(json.dumps(config | change))
        assert main(options) == 2
        assert f"--model {file}: its config changed since" in capsys.readouterr().err
    file.write_text(json.dumps(config))
    assert main([*options, "--stop-after", "3"]) == 0


def test_a_directory_is_one_runs_at_a_time(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pretrain.only_run_in(tmp_path):
        assert main(arguments(inputs, tmp_path)) == 2
    assert "another run writes to it now" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("spoil", ["truncate", "no tokenizer", "list", "latin"])
def test_spoilt_tokens_are_made_anew(inputs: Path, tmp_path: Path, spoil: str) -> None:
    arguments_ = (str(inputs / "text"), 0.3, "train", 300)
    first = tokenize_corpus(tmp_path, *arguments_)
    first.keep()
    train = np.array(first.train)
    if spoil == "truncate":
        file = tmp_path / "tokens" / "train.bin"
        file.write_bytes(file.read_bytes()[:200])
    elif spoil == "no tokenizer":
        (tmp_path / "tokenizer.json").unlink()
    else:
        description = tmp_path / "tokens" / "tokens.json"
        description.write_bytes(b"[]" if spoil == "list" else b'{"note": "\xe9"}')
    again = tokenize_corpus(tmp_path, *arguments_)
    assert again.digest == first.digest
    assert np.array_equal(again.train, train)


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--batch-size", "-1"], "--batch-size"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "-1"], "--lr"),
        (["--beta2", "1"], "--beta2"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "4294967296"], "--seed"),
        (["--vocab-size", "256"], "--vocab-size"),
        (["--valid-fraction", "0"], "--valid-fraction"),
        (["--valid-fraction", "1"], "--valid-fraction"),
        (["--adapter-fraction", "0"], "--adapter-fraction"),
        (["--warmup-steps", "12"], "--warmup-steps"),
        (["--method", "magic"], "--method"),
        (["--model", "llama-9t"], "--model llama-9t"),
        (["--model", "{inputs}/text/0.txt"], "--model"),
        (["--model", "{inputs}/t5.json"], "--model: no causal LM of type t5"),
        (["--model", "{inputs}/narrow.json"], "model has no sparse layer"),
        (["--seq-len", "65"], "--seq-len 65"),
        (["--data", "{inputs}/nothing"], "--data"),
        (["--data", "{inputs}"], "--data"),
        (["--data", "{inputs}/empty.txt"], "--data"),
        (["--data", "{inputs}/short.txt"], "--data"),
        (["--data", "{inputs}/latin.txt"], "--data"),
        (["--data", "{inputs}/bad.jsonl"], "line 2"),
        (["--tokenizer", "{inputs}/nothing"], "--tokenizer"),
        (["--tokenizer", "{inputs}/llama.json"], "--tokenizer"),
        (["--resume", "{inputs}"], "--resume"),
        (["--output-dir", "{inputs}/llama.json"], "--output-dir"),
        (["--method", "dense", "--master-weights"], "--master-weights"),
        (["--master-weights", "--half-moments"], "--half-moments"),
        (["--unknown"], "--unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_named(
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    named: str,
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "empty.txt").write_text(" \n")
    (bad / "short.txt").write_text("too short")
    (bad / "latin.txt").write_bytes("é".encode("latin-1"))
    (bad / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (bad / "t5.json").write_text('{"model_type": "t5"}')
    narrow = json.loads((inputs / "llama.json").read_text())
    narrow |= {"hidden_size": 28, "intermediate_size": 36, "num_attention_heads": 2}
    (bad / "narrow.json").write_text(json.dumps(narrow | {"num_key_value_heads": 2}))
    files = {file.name for file in bad.iterdir()}
    options = [
        option.replace("{inputs}", str(bad if Path(option).name in files else inputs))
        for option in options
    ]
    assert main(arguments(inputs, tmp_path / "run", *options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("slope-pretrain: error: ")
    assert named in error
    assert error.count("\n") == 1


def test_several_processes_are_refused(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments(inputs, tmp_path)) == 2
    assert "WORLD_SIZE" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "")  # as good as unset
    assert pretrain.Processes.from_environment() == pretrain.Processes(0, 1)


def test_missing_tensorboard_is_named(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(arguments(inputs, tmp_path, "--tensorboard")) == 2
    assert "--tensorboard" in capsys.readouterr().err


def test_demo_preset_yields_to_explicit_options() -> None:
    args = parse_arguments(["--demo", "--steps", "77"])
    assert (args.model, args.vocab_size, args.steps) == ("llama-demo", 2048, 77)
    assert args.output_dir == "runs/llama-demo-slope"
    assert parse_arguments(["--model", "opt-1.3b"]).output_dir == "runs/opt-1.3b-slope"


def test_help_describes_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    assert "--adapter-fraction" in capsys.readouterr().out
    assert all(action.help for action in build_parser()._actions)


# ---- outputs -------------------------------------------------------------------------------------


def test_outputs(undisturbed: tuple[str, Path]) -> None:
    from matplotlib.image import imread

    method, output = undisturbed
    image = imread(output / "loss.png")
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 100
    assert len((output / "sample.txt").read_text().strip()) > 5
    train = records(output)
    assert [record["step"] for record in train] == list(range(1, 13))
    assert train[-1]["tokens"] == 12 * 2 * 2 * 16
    for record in train:
        assert record["tokens_per_s"] > 0
        assert record["memory_bytes"] > 1e6
        assert record["grad_norm"] > 0
        assert record["sparsity"] == (0.5 if method == "slope" else 0.0)
    assert [record["step"] for record in records(output, "valid")] == [6, 12]
    checkpoints = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert checkpoints == ["step-000010", "step-000012"]


def test_sample_of_a_prompt_that_the_tokenizer_does_not_know(inputs: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = {token: i for i, token in enumerate(["</s>", *letters])}
    Tokenizer(models.BPE(vocabulary, [])).save(str(tmp_path / "tokenizer.json"))
    options = ("--tokenizer", tmp_path, "--sample-prompt", "123", "--steps", 3)
    assert main(arguments(inputs, tmp_path / "run", *options, "--warmup-steps", 1)) == 0
    assert (tmp_path / "run" / "sample.txt").read_text().startswith("</s> ")


def test_summary_counts_bytes(
    undisturbed: tuple[str, Path], inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, output = undisturbed
    summary = json.loads((output / "summary.json").read_text())
    weights = Path(summary["checkpoint"])
    assert summary["checkpoint_bytes"] == weights.stat().st_size
    if method == "dense":
        assert summary["dense_checkpoint_bytes"] == summary["checkpoint_bytes"]
        return
    # Per layer: four attention matrices 32 x 32 and three of 32 x 64, two layers, float32.
    dense = 4 * 2 * (4 * 32 * 32 + 3 * 32 * 64)
    stored = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in load_file(weights).items()
        if "_proj" in name
    )
    assert summary["dense_checkpoint_bytes"] == summary["checkpoint_bytes"] - stored + dense
    assert main(arguments(inputs, output, "--method", method)) == 0
    assert "MB if the linears were dense" in capsys.readouterr().out


def test_sparsity_and_bytes_of_a_layer() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 64, bias=False))
    assert sparsity(model) == 0.0
    slope.convert(model, slope.SlopeConfig(mask="magnitude", seed=0))
    assert sparsity(model) == 0.5
    compressed = 64 * 16 * 4 + 64 * 32 // 8
    assert dense_checkpoint_bytes(model, compressed + 100) == 64 * 32 * 4 + 100


def test_dense_checkpoint_loads_into_transformers(inputs: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for family in CONFIGS:
        output = tmp_path / family
        options = ("--method", "dense", "--steps", 3, "--warmup-steps", 0)
        assert main(arguments(inputs, output, *options, family=family)) == 0
        model = AutoModelForCausalLM.from_pretrained(newest(output))
        for name, tensor in load_file(newest(output) / "model.safetensors").items():
            assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.gpu
def test_resume_is_exact_on_a_gpu(tmp_path: Path) -> None:
    """Attention's backward pass, of so many tokens, adds in any order unless told otherwise."""
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / "text" / f"{i}.txt").write_text(document(i, words=8000))
    config = CONFIGS["llama"] | {"hidden_size": 128, "max_position_embeddings": 1024}
    (tmp_path / "llama.json").write_text(json.dumps(config))
    one, other = tmp_path / "one", tmp_path / "other"
    options = ["--device", "cuda", "--dtype", "bfloat16", "--no-autocast", "--deterministic"]
    options += ["--seq-len", "1024"]
    assert main(arguments(tmp_path, one, *options)) == 0
    assert main(arguments(tmp_path, other, *options, "--stop-after", 6)) == 0
    assert main(arguments(tmp_path, other, *options)) == 0
    assert_same_run(other, one)


def test_deterministic_is_of_the_run_alone(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []

    def note(_: object) -> int:
        seen.append(torch.get_deterministic_debug_mode())
        return 0

    monkeypatch.setattr(pretrain, "pretrain", note)
    torch.set_deterministic_debug_mode("warn")
    try:
        assert main(arguments(inputs, tmp_path)) == 0
        assert main(arguments(inputs, tmp_path, "--deterministic")) == 0
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.set_deterministic_debug_mode("default")
    assert seen == [1, 2]
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.gpu
def test_gpu_trains_as_the_reference_does(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """50 bf16 steps on the sparse tensor cores and on the CPU's references, masks re-chosen and
    adapters joining on the way: every loss equal to bf16 rounding."""
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / "text" / f"{i}.txt").write_text(document(i, words=8000))
    config = CONFIGS["llama"] | {"hidden_size": 256, "intermediate_size": 672}
    (tmp_path / "llama.json").write_text(json.dumps(config))
    curves = {}
    slope.plan_cache.clear()
    for device in ("cuda", "cpu"):
        options = ["--device", device, "--dtype", "bfloat16", "--no-autocast", "--master-weights"]
        options += ["--steps", 50, "--lr", 0.001, "--mask-interval", 10, "--adapter-fraction", 0.1]
        options += ["--seq-len", 64, "--batch-size", 8]
        assert main(arguments(tmp_path, tmp_path / device, *options)) == 0
        curves[device] = np.array(losses(tmp_path / device))
    on_plans = torch.cuda.get_device_capability() != (9, 0)  # else on the own kernel
    assert (slope.plan_cache.info()["plans"] > 0) == on_plans
    assert len(curves["cuda"]) == 50
    assert curves["cuda"][-1] < 0.8 * curves["cuda"][0]
    relative = np.abs(curves["cuda"] / curves["cpu"] - 1)
    record_property("largest relative difference of 50 losses", f"{relative.max():.1e}")
    record_property("their mean relative difference", f"{relative.mean():.1e}")
    eps = torch.finfo(torch.bfloat16).eps
    assert relative.max() < 2 * eps
    assert relative.mean() < eps / 2
