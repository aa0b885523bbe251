"""Turn four packages of public-domain English into training, calibration and evaluation text.

The README beside this file says which packages to fetch and how; this script reads the unpacked
files, cleans them and writes three texts:

    train.txt        what the model learns from; documents are separated by a form feed
    calibration.txt  excerpts of train.txt, for quantizers that want to see activations
    eval.txt         the last chapters of every work, seen neither in training nor in calibration

Examples:
    python corpus.py --sources sources --out work
    python corpus.py --sources sources --out work --eval-bytes 20000
"""

from __future__ import annotations

import argparse
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

# One document is one chapter or one speech: paragraphs separated by a blank line.
# One work is the documents of one book, in reading order.
Work = list[str]

# A form feed never occurs in the sources, so it can separate documents in train.txt.
DOCUMENT_BREAK = "\f"

# Speeches up to this year are public domain twice: as works of the US government, and by age.
LAST_SPEECH_YEAR = 1929

# A vocabulary of 2048 has no room for typographic variants of the same sign.
PLAIN_SIGNS = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "—": "--", "–": "-", "‑": "-", "•": "", "\u00a0": " "}
)

AUSTEN_HEADING = re.compile(r"(?:chapter|volume)\s+[0-9ivxl]+\.?", re.IGNORECASE)
AUSTEN_END = re.compile(r"finis|the end|a note on the text", re.IGNORECASE)
BIBLE_HEADING = re.compile(r"(?:[1-3] )?[A-Z][A-Za-z ]+ \d+")


def plain(text: str) -> str:
    """One paragraph on one line, with single spaces and typewriter punctuation."""
    return re.sub(r"\s+", " ", text.translate(PLAIN_SIGNS)).strip()


def r_strings(serialized: bytes) -> Iterator[str]:
    """The elements of one character vector in R's binary serialization ("X" format).

    Each element is a CHARSXP: a 4-byte flag word whose last byte is the type 9, a big-endian 4-byte
    length, the bytes. The other flag bits tell ASCII from UTF-8, and UTF-8 reads both.
    """
    # The header is "X\n", three versions and the name of the native encoding with its length;
    # then come a flag word (type 16, a string vector) and the number of elements.
    (name_length,) = struct.unpack_from(">i", serialized, 14)
    kind, count = struct.unpack_from(">ii", serialized, 18 + name_length)
    if kind & 0xFF != 16:
        raise ValueError(f"expected an R character vector (type 16), got type {kind & 0xFF}")
    offset = 26 + name_length
    for _ in range(count):
        _, length = struct.unpack_from(">ii", serialized, offset)
        yield serialized[offset + 8 : offset + 8 + max(length, 0)].decode()
        offset += 8 + max(length, 0)


def austen(sources: Path) -> Iterator[Work]:
    """Six novels, from the lazy-load database of the R package: one zlib stream per novel.

    A record is a 4-byte length and a zlib stream. The novels are wrapped at 72 characters and mark
    emphasis with underscores, which are dropped. Whatever precedes the first chapter (title pages)
    is dropped, and so is everything from the closing line on: in one novel that line is followed
    by a modern editor's note, which is not the author's.
    """
    (database,) = sources.rglob("janeaustenr/data/Rdata.rdb")
    packed = database.read_bytes()
    while packed:
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(packed[4:]))
        packed = stream.unused_data
        chapters: Work = []
        body: list[str] | None = None
        for line in [*lines, "THE END"]:
            stripped = line.strip()
            ends = AUSTEN_END.fullmatch(stripped) is not None
            if not ends and not AUSTEN_HEADING.fullmatch(stripped):
                if body is not None:
                    body.append(stripped.replace("_", ""))
                continue
            paragraphs = "\n".join(body or []).split("\n\n")
            text = "\n\n".join(p for p in map(plain, paragraphs) if p)
            if text:
                chapters.append(text)
            body = []
            if ends:
                break
        yield chapters


def moby_dick(sources: Path) -> Iterator[Work]:
    """135 chapters and the epilogue; each file starts with its heading, kept as a paragraph."""
    (folder,) = {path.parent for path in sources.rglob("chapter_135.txt")}
    files = sorted(folder.glob("chapter_*.txt"), key=lambda p: int(p.stem.split("_")[1]))
    yield [
        "\n\n".join(p for p in map(plain, file.read_text("utf-8").split("\n\n")) if p)
        for file in [*files, folder / "epilogue.txt"]
    ]


def bible(sources: Path) -> Iterator[Work]:
    """1189 chapters; one verse is one line without its number, the heading is kept ("Ruth 1")."""
    (dump,) = sources.rglob("bible.txt")
    chapters: Work = []
    for line in dump.read_text("utf-8").splitlines():
        text = plain(line)
        if BIBLE_HEADING.fullmatch(text) and not line.startswith(" "):
            chapters.append(text + "\n")
        elif text:
            chapters[-1] += "\n" + re.sub(r"^\d+ ", "", text)
    yield chapters


def addresses(sources: Path) -> Iterator[Work]:
    """State of the Union addresses from 1790 to `LAST_SPEECH_YEAR`, by year; each is one line."""
    (folder,) = {path.parent for path in sources.rglob("1790_*.txt")}
    files = sorted(folder.glob("*_*.txt"))
    yield [plain(file.read_text("utf-8")) for file in files if int(file.name.split("_")[0]) <= LAST_SPEECH_YEAR]


SOURCES: dict[str, Callable[[Path], Iterator[Work]]] = {
    "Austen": austen,
    "Moby-Dick": moby_dick,
    "Bible": bible,
    "Addresses": addresses,
}


def hold_out(work: Work, budget: int) -> tuple[Work, Work]:
    """Cut the last documents off one work: as many as fit into `budget` characters, at least one.

    Whole documents at the end, rather than random paragraphs, so that no sentence of the evaluation
    text has its neighbours in the training text. A document over the budget is left out of training
    as a whole, and only its start is used.
    """
    cut, size = len(work) - 1, len(work[-1])
    while cut > 1 and size + len(work[cut - 1]) <= budget:
        cut -= 1
        size += len(work[cut])
    return work[:cut], [excerpt(document, budget) for document in work[cut:]]


def excerpt(document: str, size: int) -> str:
    """The first `size` characters of a document, cut back to the end of a sentence."""
    if len(document) <= size:
        return document
    end = document.rfind(". ", 0, size)
    return document[: end + 1 if end > 0 else size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="the unpacked packages")
    parser.add_argument("--out", type=Path, required=True, help="where the three texts go")
    parser.add_argument("--eval-bytes", type=int, default=45_000, help="about this much of each source is held out")
    parser.add_argument("--calibration-bytes", type=int, default=64_000, help="about this much of each source")
    parser.add_argument("--seed", type=int, default=0, help="chooses the calibration excerpts")
    args = parser.parse_args()

    train: list[str] = []
    held_out: list[str] = []
    calibration: list[str] = []
    rng = random.Random(args.seed)
    for name, read in SOURCES.items():
        works = list(read(args.sources))
        parts = [hold_out(work, args.eval_bytes // len(works)) for work in works]
        learned = [document for kept, _ in parts for document in kept]
        unseen = [document for _, cut in parts for document in cut]
        train += learned
        held_out += unseen
        size = 0
        for document in rng.sample(learned, len(learned)):
            if size >= args.calibration_bytes:
                break
            calibration.append(excerpt(document, 8_000))
            size += len(calibration[-1])
        counts = f"{len(works)} works, {len(learned)} + {len(unseen)} documents"
        sizes = f"{sum(map(len, learned)):,} + {sum(map(len, unseen)):,} characters"
        print(f"{name:10} {counts}, {sizes} (train + held out)")

    args.out.mkdir(parents=True, exist_ok=True)
    rng.shuffle(calibration)
    for file, documents, separator in [
        ("train.txt", train, DOCUMENT_BREAK),
        ("eval.txt", held_out, "\n\n"),
        ("calibration.txt", calibration, "\n\n"),
    ]:
        text = separator.join(documents) + "\n"
        (args.out / file).write_text(text, "utf-8")
        print(f"{file:15} {len(text.encode()):>10,} bytes")


if __name__ == "__main__":
    main()
