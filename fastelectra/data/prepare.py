"""`fastelectra prepare`: text files to token shards, a tokenizer and a manifest."""

import argparse
import ctypes
import fcntl
import hashlib
import json
import math
import os
import shutil
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import reduce
from itertools import islice
from pathlib import Path

import numpy as np

from fastelectra.data import demo, summary, vocabulary
from fastelectra.data.encoding import CHUNK_CHARACTERS, WORKER_BYTES, encode_in_order, make_chunks
from fastelectra.data.progress import Progress
from fastelectra.data.reader import Reader
from fastelectra.data.shards import Corpus, Manifest, file_sha256, write_durably
from fastelectra.data.sources import SKIPPED, Skipped, Source, Sources, find_sources
from fastelectra.data.writer import ShardWriter
from fastelectra.errors import FastElectraError

SHARD_BYTES = 256 << 20  # of text a shard: about 64 M tokens
VOCAB_SIZE = 30522  # as the paper's
MOST_ENTRIES = 1 << 24  # of a vocabulary that is trained
SAMPLE_BYTES = 64 << 20  # of text that a vocabulary is trained on
_GOLDEN = 0x9E3779B97F4A7C15  # multiples of it, modulo 2^64, are spread evenly


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `prepare`."""
    # fmt: off
    add = parser.add_argument
    path = os.path.expanduser  # shells leave the ~ in --out=~/corpus
    add("inputs", nargs="*", type=path, metavar="INPUT",
        help="files, folders or globs of .txt, .jsonl or .parquet, each also .gz or .zst")
    add("--demo", action="store_true", help="fetch and prepare the demo text (17 MB)")
    add("--out", type=path, metavar="DIR", help="folder to make (with --demo: data/demo)")
    document = parser.add_mutually_exclusive_group()
    document.add_argument(
        "--one-document-per-file", dest="documents", action="store_const", const="file",
        default="blank-line", help="of .txt (otherwise blank lines separate documents)")
    document.add_argument(
        "--one-document-per-line", dest="documents", action="store_const", const="line",
        help="of .txt")
    add("--field", default="text", metavar="NAME",
        help="of .jsonl and .parquet records that holds the text (default: text)")
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--vocab", type=path, metavar="FILE",
        help="use this vocab.txt or tokenizer.json, or that of a folder")
    words.add_argument(
        "--vocab-size", type=int, metavar="N",
        help=f"train a WordPiece vocabulary (default: {VOCAB_SIZE}, demo {demo.VOCAB_SIZE})")
    add("--cased", action="store_true", help="keep upper case and accents")
    add("--keep-accents", action="store_true", help="make lower case, but keep accents")
    add("--heldout-fraction", type=float, default=0.01, metavar="SHARE",
        help="of the documents, kept for evaluation (default: 0.01)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="processes; the result does not depend on them (default: one a core)")
    # fmt: on


def run(args: argparse.Namespace) -> int:
    """Prepare a corpus; FastElectraError for anything the user can mend."""
    try:
        return _run(args)
    except sqlite3.Error as error:
        raise FastElectraError(
            f"lists of input files, which are kept in TMPDIR, else /var/tmp: {error}"
        ) from None


def _run(args: argparse.Namespace) -> int:
    if args.vocab:
        args.vocab = str(vocabulary.file_of(Path(args.vocab)))
    _check(args)
    out = _destination(args.out or "data/demo")
    skipped = Skipped()
    sources = find_sources([str(demo.demo_text())] if args.demo else args.inputs)
    other_kinds = sources.other_kinds
    sources, settings = _settings(args, sources, skipped)
    if _is_done(out, settings):
        print(f"{out} is prepared already", file=sys.stderr)
        return 0
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if args.workers > 1 else "false"
    with _partial_folder(out) as partial:
        _begin(partial, settings)
        manifest = _prepare(args, sources, settings, skipped, partial)
        os.replace(partial, out)
        (out / "lock").unlink()  # only now: without it what is in `partial` is not ours
    _tell(summary.lines(out, manifest, skipped, other_kinds))
    return 0


def _destination(name: str) -> Path:
    """The folder to make; FastElectraError for one that could not be replaced in one step."""
    out = Path(name).resolve() if Path(name).is_symlink() else Path(name)
    if os.path.ismount(out) or out.resolve() == Path.cwd():
        raise FastElectraError(
            f"{out} is a mount point or the present folder: choose a folder in it as --out"
        )
    return out


def _check(args: argparse.Namespace) -> None:
    if args.demo and args.inputs:
        raise FastElectraError("--demo brings its own text: leave out INPUT, or --demo")
    if not args.demo and not args.inputs:
        raise FastElectraError("give INPUT files or folders to prepare, or --demo")
    if not args.out and not args.demo:
        raise FastElectraError("--out DIR is missing: the folder to make")
    if not 0 <= args.heldout_fraction < 1:
        raise FastElectraError(f"--heldout-fraction {args.heldout_fraction}: must be in [0, 1)")
    if args.workers < 1:
        raise FastElectraError(f"--workers {args.workers}: must be at least 1")
    if args.vocab_size is not None and not 0 < args.vocab_size <= MOST_ENTRIES:
        raise FastElectraError(f"--vocab-size {args.vocab_size}: must be in [1, {MOST_ENTRIES}]")
    if args.vocab and not Path(args.vocab).is_file():
        raise FastElectraError(f"--vocab {args.vocab}: no such file")
    if args.vocab and args.vocab.endswith(".json") and (args.cased or args.keep_accents):
        raise FastElectraError(
            f"{args.vocab} itself says how text is normalised: leave out --cased, --keep-accents"
        )


def _settings(args: argparse.Namespace, found: Sources, skipped: Skipped) -> tuple[Sources, dict]:
    """The sources to use, and all that decides the result: their contents, and options."""
    used, rest = Sources(), iter(found)
    with ThreadPoolExecutor(args.workers) as pool:
        while part := list(islice(rest, 1000)):  # what waits in the pool takes 1 kB a file
            for source, (digest, problem) in zip(part, pool.map(_digest, part), strict=True):
                if problem:
                    skipped.add(source.path, problem)
                elif original := used.add(digest, source):
                    skipped.add(source.path, "a copy of another file", os.path.basename(original))
    if not len(used):
        raise FastElectraError(f"there is no text in the input{skipped}")
    root, contents = _root(used), hashlib.sha256()
    for digest, source in used.items():
        name = os.path.relpath(os.path.realpath(source.path), root)
        contents.update(digest + os.fsencode(name) + b"\0")
    inputs = {
        "files": len(used),
        "bytes": sum(source.size for source in used),
        "sha256": contents.hexdigest(),  # of each file's content and name
    }
    words: dict = _style(args)
    if args.vocab:
        words["sha256"] = file_sha256(Path(args.vocab))
    else:
        default = demo.VOCAB_SIZE if args.demo else VOCAB_SIZE
        words["size"] = default if args.vocab_size is None else args.vocab_size
    settings = {
        "inputs": inputs,
        "documents": args.documents,
        "field": args.field,
        "vocabulary": words,
        "heldout_fraction": args.heldout_fraction,
    }
    return used, settings


def _digest(source: Source) -> tuple[bytes, str]:
    """The SHA-256 of its content, or why it is of no use."""
    try:
        return bytes.fromhex(file_sha256(Path(source.path))), "" if source.size else "empty"
    except OSError as error:
        return b"", error.strerror


def _root(sources: Iterable[Source]) -> Path:
    """The folder that all of them are in."""
    folders = (os.path.dirname(os.path.realpath(source.path)) for source in sources)
    return Path(reduce(lambda a, b: os.path.commonpath((a, b)), folders))


def _style(args: argparse.Namespace) -> dict[str, bool]:
    """How text is normalised: as the vocabulary's folder says, but for what the options say."""
    style = {"lowercase": True, "strip_accents": True}
    if args.vocab:
        style = vocabulary.normalisation(Path(args.vocab))
    if style and args.cased:
        style["lowercase"] = False
    if style and (args.cased or args.keep_accents):
        style["strip_accents"] = False
    return style


def _is_done(out: Path, settings: dict) -> bool:
    """Whether `out` holds this very corpus; FastElectraError when it holds something else."""
    if (out / "manifest.json").is_file():
        manifest = Manifest.read(out / "manifest.json")
        if manifest.settings != settings:
            changed = [name for name in settings if manifest.settings.get(name) != settings[name]]
            raise FastElectraError(
                f"{out} was prepared from other input or settings ({', '.join(changed)}): choose"
                " another --out, or delete it"
            )
        Corpus(out, manifest).check()
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FastElectraError(f"{out} exists and is not a prepared corpus: choose another --out")
    return False


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """The folder beside `out` to work in, locked. An error removes it, an interruption does not.

    FastElectraError when it holds something else.
    """
    partial = out.with_name(f"{out.name}.partial")
    if partial.is_dir() and any(partial.iterdir()) and not (partial / "lock").is_file():
        raise FastElectraError(
            f"{partial}, where `prepare` would work, has other files: move them, or choose another"
            " --out"
        )
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FastElectraError(f"another `prepare` is at work in {partial}") from None
        except OSError:
            pass  # a file system without locks
        try:
            yield partial
        except KeyboardInterrupt:
            print(f"\nthe same command goes on with {partial}", file=sys.stderr)
            raise
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and not error.filename:  # such as a full disk
                error.filename = str(out)
            raise


def _begin(partial: Path, settings: dict) -> None:
    """Remove what another job left in `partial`."""
    note, text = partial / "settings.json", json.dumps(settings)
    if note.is_file() and note.read_text() == text:
        return
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
    note.write_text(text)


def _prepare(
    args: argparse.Namespace,
    sources: Sources,
    settings: dict,
    skipped: Skipped,
    folder: Path,
) -> Manifest:
    if not (folder / "tokenizer").exists():
        vocabulary.write(_make_tokenizer(args, sources, settings), folder / "tokenizer.new")
        os.replace(folder / "tokenizer.new", folder / "tokenizer")
    tokenizer = vocabulary.load(folder / "tokenizer")
    size = tokenizer.get_vocab_size()
    dtype = np.dtype("<u2" if size <= 65535 else "<u4")
    text_bytes = sum(source.text_bytes for source in sources)
    train = math.ceil(text_bytes / SHARD_BYTES)
    heldout = math.ceil(text_bytes * args.heldout_fraction / SHARD_BYTES)
    writer = ShardWriter(folder, ["train"] * train + ["heldout"] * heldout, dtype)

    reader = Reader(sources, args.documents, args.field, skipped)
    chunks = make_chunks(reader, _placement(train, heldout, args.heldout_fraction))
    workers = max(1, min(args.workers, text_bytes // WORKER_BYTES))
    with Progress("encoding", sum(source.size for source in sources)) as progress:
        todo = islice(chunks, writer.chunks, None)
        for encoded in encode_in_order(todo, folder / "tokenizer", dtype, workers):
            writer.add(encoded)
            progress.update(reader.bytes_read)
    shards, counts = writer.finish()
    if not any(shard.tokens for shard in shards):
        raise FastElectraError(f"there is no text in {next(iter(sources)).path}{skipped}")
    write_durably(folder / SKIPPED, skipped.to_jsonl(_root(sources)))
    manifest = Manifest(
        tokenizer_fingerprint=file_sha256(folder / "tokenizer/tokenizer.json"),
        vocab_size=size,
        special_tokens=asdict(vocabulary.SpecialTokens.of(tokenizer, "the tokenizer")),
        token_bytes=dtype.itemsize,
        settings=settings,
        counts=counts | {"skipped": skipped.by_reason().total()},
        shards=shards,
    )
    manifest.write(folder / "manifest.json")
    for name in ("settings.json", "progress.json"):
        (folder / name).unlink()
    return manifest


def _make_tokenizer(args: argparse.Namespace, sources: Sources, settings: dict):
    if args.vocab:
        return vocabulary.read(Path(args.vocab), **_style(args))
    reader = Reader(sources, args.documents, args.field, Skipped())
    share = SAMPLE_BYTES / sum(source.text_bytes for source in sources)
    with Progress("making the vocabulary", sum(source.size for source in sources)) as progress:
        texts = _sample(reader, share, lambda: progress.update(reader.bytes_read))
        characters: Counter[str] = Counter()
        try:
            tokenizer = vocabulary.train(_counted(texts, characters), **settings["vocabulary"])
        except FastElectraError as error:
            raise FastElectraError(f"{error}{reader.skipped}") from None
    if settings["vocabulary"]["strip_accents"]:
        _tell(summary.harm(characters))
    with suppress(OSError, AttributeError):  # give 400 MB back before the workers start
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return tokenizer


def _counted(texts: Iterable[str], characters: Counter[str]) -> Iterator[str]:
    """The same; every 17th character is counted."""
    for text in texts:
        characters.update(text[::17])
        yield text


def _sample(lines: Iterable[str | None], share: float, report: Callable[[], None]) -> Iterator[str]:
    """About this share of the lines, evenly spread, in blocks; at most twice SAMPLE_BYTES."""
    block: list[str] = []
    size = total = 0
    for number, line in enumerate(line for line in lines if line is not None):
        if number * _GOLDEN % 2**64 > share * 2**64:
            continue
        block.append(line)
        size += len(line)
        if size >= CHUNK_CHARACTERS:
            yield "\n".join(block)
            report()
            total += size
            block, size = [], 0
            if total >= 2 * SAMPLE_BYTES:
                return
    yield "\n".join(block)


def _placement(train: int, heldout: int, fraction: float) -> Callable[[int, list[str]], int]:
    """The shard of a document by its running number and text: train shards, then held-out ones.

    A document is held out by a hash of its text, so that its copies are too. The first document
    never is and the second always, so that neither split of a small corpus is empty.
    """

    def shard_of(number: int, lines: list[str]) -> int:
        place = _hash(str(number).encode())
        is_heldout = number == 1 or (
            number > 1 and _hash("\n".join(lines).encode()) < fraction * 2**64
        )
        return train + place % heldout if heldout and is_heldout else place % train

    return shard_of


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
