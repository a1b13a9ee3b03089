# SPDX-License-Identifier: Apache-2.0
"""Text corpus -> tokenizer -> token files -> batches.

Everything here is a pure function of the corpus, the options and the seed, so that a resumed run
sees the same batches as an undisturbed one.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from slope_ext.recipes import UsageError
from slope_ext.recipes.checkpoint import checksum
from slope_ext.recipes.files import read_object, replace_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEMO_TEXT = Path(__file__).parent / "demo_text"
END_OF_TEXT = "<|endoftext|>"
# What published tokenizers call their end of a document.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_DOCUMENTS_PER_CALL = 256

Documents = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Source:
    """A corpus before tokenization.

    ``documents`` and ``valid`` open an iterator over the documents and can be called many times;
    ``valid`` is None when the corpus brings no split of its own. ``identity`` is a JSON value
    that changes when the files behind the corpus do (names and hashes).
    """

    documents: Documents
    valid: Documents | None
    identity: Any


# ------------------------------------------------------------------------------------------------
# Corpus


def open_source(spec: str) -> Source:
    """Find the corpus that ``--data`` names.

    ``spec`` is ``demo``, a .txt file (one document), a .jsonl file (a ``text`` field per line), a
    directory with ``train.jsonl`` and ``valid.jsonl``, a directory or glob of .txt files, or
    ``hf:NAME[:CONFIG][:SPLIT]``. Raises :class:`UsageError` when there is nothing there.
    """
    if spec.startswith("hf:"):
        return Source(partial(_read_hugging_face, spec), None, spec)
    path = DEMO_TEXT if spec == "demo" else Path(spec)
    if path.is_dir():
        train, valid = path / "train.jsonl", path / "valid.jsonl"
        if train.is_file() and valid.is_file():
            return Source(
                partial(_read_files, [train]),
                partial(_read_files, [valid]),
                _identity([train, valid]),
            )
        files = sorted(path.glob("*.txt"))
    elif path.is_file():
        files = [path]
    else:
        files = sorted(p for p in map(Path, glob.glob(spec, recursive=True)) if p.is_file())
    if not files:
        problem = "holds no .txt files" if path.is_dir() else "no such file, directory or glob"
        raise UsageError(f"--data {spec}: {problem}")
    return Source(partial(_read_files, files), None, _identity(files))


def _identity(files: Iterable[Path], option: str = "--data") -> list[list[str]]:
    """Names and hashes: a cache of tokens serves only the very files that it was made from."""
    identity = []
    for file in files:
        try:
            identity.append([file.name, checksum(file)])
        except OSError as error:
            raise UsageError(f"{option} {file}: {error.strerror}") from error
    return identity


def _read_files(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        try:
            if file.suffix == ".jsonl":
                yield from _read_json_lines(file)
            else:
                yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"--data {file}: not UTF-8 text ({error.reason})") from error
        except OSError as error:
            raise UsageError(f"--data {file}: {error.strerror}") from error


def _read_json_lines(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise UsageError(f'--data {file}: line {number} has no "text" string')
            # JSON can spell half a surrogate pair, which is no character and has no encoding.
            yield text.encode(errors="replace").decode()


def _read_hugging_face(spec: str) -> Iterator[str]:
    """Documents of ``hf:NAME[:CONFIG][:SPLIT]`` (split ``train`` unless given)."""
    name, config, split, *rest = [*spec.removeprefix("hf:").split(":"), "", ""]
    if not name or any(rest):
        raise UsageError(f"--data {spec}: not of the form hf:NAME[:CONFIG][:SPLIT]")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--data {spec}: needs the package datasets (pip install 'slope-ext[datasets]')"
        ) from error
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the hub, the cache and each builder raise their own kinds
        reason = str(error).strip() or type(error).__name__
        raise UsageError(f"--data {spec}: {reason.splitlines()[0]}") from error
    if "text" not in rows.column_names:
        raise UsageError(f'--data {spec}: no "text" column, only {", ".join(rows.column_names)}')
    for number, row in enumerate(rows):
        if not isinstance(row["text"], str):
            raise UsageError(f'--data {spec}: row {number} has no "text" string')
        yield row["text"]


# ------------------------------------------------------------------------------------------------
# Split


def split_documents(source: Source, valid_fraction: float) -> tuple[Documents, Documents, str]:
    """Split the corpus into train and validation documents, and say how.

    A document goes by the hash of its text, so the split does not depend on the order of the
    files, and equal documents stay together. With two documents or more, each side has at least
    one; a single document is cut at the line break nearest before its last ``valid_fraction``.
    Raises :class:`UsageError` when the corpus has no text.
    """
    if source.valid is not None:
        return _non_empty(source.documents), _non_empty(source.valid), "split given by the corpus"
    documents = _non_empty(source.documents)
    hashes = np.fromiter((_document_hash(text) for text in documents()), dtype=np.uint64)
    if len(hashes) == 0:
        raise UsageError("--data: the corpus has no text")
    if len(hashes) == 1:
        return *_cut_document(next(documents()), valid_fraction), (
            "a single document: its end is the validation split"
        )
    is_valid = hashes < np.uint64(valid_fraction * 2.0**64)
    is_valid[hashes.argmin()] = True
    is_valid[hashes.argmax() if hashes.min() < hashes.max() else -1] = False
    note = f"{len(hashes)} documents, {int(is_valid.sum())} of them for validation"

    def side(valid: bool) -> Documents:
        return lambda: (text for text, v in zip(documents(), is_valid, strict=True) if v == valid)

    return side(False), side(True), note


def _non_empty(documents: Documents) -> Documents:
    return lambda: (text for text in documents() if text.strip())


def _document_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _cut_document(text: str, valid_fraction: float) -> tuple[Documents, Documents]:
    position = int(len(text) * (1 - valid_fraction))
    cut = text.rfind("\n", 0, position) + 1 or position
    head, tail = text[:cut], text[cut:]
    return lambda: iter([head]), lambda: iter([tail])


# ------------------------------------------------------------------------------------------------
# Tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most ``vocab_size`` entries (at least 257: the bytes and the end)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    return tokenizer


def _tokenizer_file(path: str) -> Path:
    return Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)


def load_tokenizer(path: str) -> Tokenizer:
    """Read ``tokenizer.json`` (the file or its directory); raises :class:`UsageError`."""
    from tokenizers import Tokenizer

    file = _tokenizer_file(path)
    if not file.is_file():
        raise UsageError(f"--tokenizer {path}: no such file")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise UsageError(f"--tokenizer {path}: not a tokenizer.json ({error})") from error
    # What a file has of these is meant for batches of sentences; documents are read whole
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The token between documents; raises :class:`UsageError` if the tokenizer has none."""
    for name in _END_OF_TEXT_NAMES:
        token: int | None = tokenizer.token_to_id(name)
        if token is not None:
            return token
    raise UsageError(f"--tokenizer: has none of the tokens {' '.join(_END_OF_TEXT_NAMES)}")


def _vocab_size(tokenizer: Tokenizer) -> int:
    return int(max(tokenizer.get_vocab().values())) + 1


# ------------------------------------------------------------------------------------------------
# Tokens


@dataclass(frozen=True)
class TokenizedCorpus:
    """Token ids of both splits, each document followed by the end-of-text token.

    ``train`` and ``valid`` are 1-D memory maps of uint16 or uint32; ``digest`` is a hash of both,
    by which a resumed run knows that it has the same data. What was made anew lies in ``fresh``
    until :meth:`keep` puts it in the place of what an earlier run had.
    """

    directory: Path
    fresh: Path | None
    tokenizer: Tokenizer
    train: npt.NDArray[Any]
    valid: npt.NDArray[Any]
    note: str
    digest: str

    def keep(self) -> None:
        """Replaces the tokenizer and tokens of an earlier run by those that were made anew."""
        if self.fresh is not None:
            cache = self.directory / "tokens"
            shutil.rmtree(cache, ignore_errors=True)
            os.replace(self.fresh / "tokenizer.json", self.directory / "tokenizer.json")
            self.fresh.rename(cache)

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: published tokenizers may leave ids unused."""
        return _vocab_size(self.tokenizer)

    @property
    def end_of_text(self) -> int:
        """The id of the token between documents."""
        return end_of_text_id(self.tokenizer)


def tokenize_corpus(
    directory: Path, data: str, valid_fraction: float, tokenizer: str, vocab_size: int
) -> TokenizedCorpus:
    """Tokenize ``data`` beside ``directory/tokens``, or reuse what an earlier run kept there.

    That is ``tokenizer.json`` and ``tokens/{train,valid}.bin`` with their description
    ``tokens/tokens.json``. Raises :class:`UsageError` for a corpus or tokenizer that cannot be
    used.
    """
    source = open_source(data)
    cache, fresh = directory / "tokens", None
    made_from = {
        "data": [data, source.identity],
        "valid_fraction": valid_fraction,
        "tokenizer": [tokenizer, vocab_size]
        if tokenizer == "train"
        # A missing file is reported where the tokenizer is loaded.
        else _identity(filter(Path.is_file, [_tokenizer_file(tokenizer)]), "--tokenizer"),
    }
    description = read_object(cache / "tokens.json") or {}
    kept = description.get("made_from") == made_from and (directory / "tokenizer.json").is_file()
    if not kept or description.get("bytes") != _sizes(cache):
        fresh = cache = directory / "tokens.new"
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True)
        train, valid, note = split_documents(source, valid_fraction)
        codec = (
            train_tokenizer(train(), vocab_size)
            if tokenizer == "train"
            else load_tokenizer(tokenizer)
        )
        codec.save(str(cache / "tokenizer.json"))
        dtype = "uint16" if _vocab_size(codec) <= 2**16 else "uint32"
        # The tokenizer too: other letters in the same places give the same numbers.
        digest = hashlib.blake2b(codec.to_str().encode(), digest_size=16)
        for name, documents in (("train", train), ("valid", valid)):
            with (cache / f"{name}.bin").open("wb") as file:
                for tokens in _encode(documents(), codec, dtype):
                    digest.update(tokens)
                    file.write(tokens)
        description = {
            "made_from": made_from,
            "dtype": dtype,
            "note": note,
            "bytes": _sizes(cache),
            "digest": digest.hexdigest(),
        }
        # Written last, under its final name only when whole: it vouches for the token files.
        replace_text(cache / "tokens.json", json.dumps(description, indent=2) + "\n")
    return TokenizedCorpus(
        directory=directory,
        fresh=fresh,
        tokenizer=load_tokenizer(str(fresh or directory)),
        train=_map_tokens(cache / "train.bin", description["dtype"]),
        valid=_map_tokens(cache / "valid.bin", description["dtype"]),
        note=description["note"],
        digest=description["digest"],
    )


def _sizes(cache: Path) -> dict[str, int]:
    """Bytes of the token files that are there."""
    return {file.name: file.stat().st_size for file in sorted(cache.glob("*.bin"))}


def _encode(documents: Iterator[str], tokenizer: Tokenizer, dtype: str) -> Iterator[bytes]:
    end = end_of_text_id(tokenizer)
    while batch := list(islice(documents, _DOCUMENTS_PER_CALL)):
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            yield np.array([*encoding.ids, end], dtype=dtype).tobytes()


def _map_tokens(file: Path, dtype: str) -> npt.NDArray[Any]:
    # numpy cannot map an empty file.
    return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)


# ------------------------------------------------------------------------------------------------
# Batches


class Blocks:
    """Tokens cut in blocks of ``seq_len + 1``, in an order that is a function of the seed.

    The k-th sample of the run is block ``order(k // n)[k % n]`` of the n blocks, where
    ``order(epoch)`` is a permutation drawn from (seed, epoch), or 0..n-1 if ``seed`` is None. No
    state is kept between batches, so the position in the data is known from the step alone.
    """

    def __init__(self, tokens: npt.NDArray[Any], seq_len: int, seed: int | None = None) -> None:
        """``tokens`` is 1-D; raises :class:`UsageError` if it is shorter than one block."""
        self.count = len(tokens) // (seq_len + 1)
        if self.count == 0:
            raise UsageError(
                f"--data: a split of {len(tokens)} tokens is shorter than one block of "
                f"{seq_len + 1} tokens (--seq-len + 1)"
            )
        self._blocks = tokens[: self.count * (seq_len + 1)].reshape(self.count, seq_len + 1)
        self._seed = seed
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.arange(self.count)

    def block_index(self, sample: int) -> int:
        """The block that is the run's ``sample``-th, counted from 0."""
        epoch, position = divmod(sample, self.count)
        if self._seed is not None and epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self.count)
            self._epoch = epoch
        return int(self._order[position])

    def batch(self, first: int, size: int) -> torch.Tensor:
        """Samples ``first .. first + size - 1`` as an int64 tensor [size, seq_len + 1]."""
        rows = [self.block_index(sample) for sample in range(first, first + size)]
        return torch.from_numpy(self._blocks[rows].astype(np.int64))
