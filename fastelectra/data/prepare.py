"""`fastelectra prepare`: text files to token shards, a tokenizer and a manifest."""

import argparse
import hashlib
from itertools import chain
from pathlib import Path

import numpy as np

from fastelectra.data import vocabulary
from fastelectra.data.shards import LINES_DTYPE, Manifest, ShardEntry, file_sha256
from fastelectra.data.sources import read_documents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--vocab-size", type=int, default=30522, metavar="N")
    parser.add_argument("--heldout-fraction", type=float, default=0.01, metavar="SHARE")


def run(args: argparse.Namespace) -> int:
    files, out = [Path(name) for name in args.inputs], Path(args.out)
    out.mkdir(parents=True)
    texts = ("\n".join(lines) for lines in read_documents(files))
    vocabulary.write(vocabulary.train(texts, args.vocab_size, True, True), out / "tokenizer")
    tokenizer = vocabulary.load_for_encoding(out / "tokenizer")
    vocab_size = tokenizer.get_vocab_size()
    width = 2 if vocab_size <= 65535 else 4
    names = {"train": "train-00000", "heldout": "heldout-00000"}
    documents = dict.fromkeys(names, 0)
    files_open = {
        (split, suffix): open(out / f"{name}.{suffix}", "wb")  # noqa: SIM115
        for split, name in names.items()
        for suffix in ("tokens", "lines")
    }
    for number, lines in enumerate(read_documents(files)):
        digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).digest()
        share = int.from_bytes(digest, "little") / 2**64
        heldout = number == 1 or (number > 1 and share < args.heldout_fraction)
        split = "heldout" if heldout else "train"
        ids = [e.ids for e in tokenizer.encode_batch_fast(lines, add_special_tokens=False)]
        tokens = np.fromiter(chain.from_iterable(ids), f"<u{width}")
        lengths = np.array([len(line) for line in ids if line] + [0], LINES_DTYPE)
        files_open[split, "tokens"].write(tokens.tobytes())
        files_open[split, "lines"].write(lengths.tobytes())
        documents[split] += 1
    for file in files_open.values():
        file.close()
    shards = []
    for split, name in names.items():
        paths = {suffix: out / f"{name}.{suffix}" for suffix in ("tokens", "lines")}
        shards.append(
            ShardEntry(
                split,
                name,
                documents[split],
                paths["lines"].stat().st_size // 4,
                paths["tokens"].stat().st_size // width,
                {suffix: file_sha256(path) for suffix, path in paths.items()},
            )  # fmt: skip
        )
    settings: dict = {}
    fingerprint = hashlib.sha256((out / "tokenizer/tokenizer.json").read_bytes()).hexdigest()
    Manifest(
        fingerprint, vocab_size, vocabulary.special_tokens(out / "tokenizer"), width, settings,
        {}, shards,
    ).write(out / "manifest.json")  # fmt: skip
    return 0
