"""Documents to token arrays: cut into chunks, encoded by worker processes, in a fixed order."""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from fastelectra.data import vocabulary
from fastelectra.errors import FastElectraError

CHUNK_CHARACTERS = 1 << 20  # text handed to a worker at a time; a longer document is cut
WORKER_BYTES = 32 << 20  # less text than this a worker is not worth starting a process
LINES_DTYPE = np.dtype("<u4")


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one too long for a chunk."""

    shard: int  # that it goes to
    lines: list[str]
    begins: bool  # the document
    ends: bool


@dataclass(frozen=True)
class Encoded:
    """What a chunk adds to one shard."""

    shard: int
    tokens: np.ndarray  # uint16 | uint32 [N]
    lines: np.ndarray  # uint32: tokens of each line, 0 = end of document
    documents: int  # that begin here
    unknown: int  # tokens that are [UNK]


def make_chunks(
    lines: Iterable[str | None], shard_of: Callable[[int, list[str]], int]
) -> Iterator[list[Piece]]:
    """Group lines (None ends a document) into chunks that depend on nothing but the lines.

    `shard_of` gets a document's running number and its first lines (all, up to a chunk).
    """
    chunk: list[Piece] = []
    chunk_size, size, number, shard = 0, 0, 0, None
    pending: list[str] = []
    for line in chain(lines, [None]):
        if line is not None:
            pending.append(line)
            size += len(line)
            if size < CHUNK_CHARACTERS:
                continue
        if shard is None and not pending:
            continue  # two ends in a row
        begins, ends = shard is None, line is None
        if begins:
            shard = shard_of(number, pending)
            number += 1
        chunk.append(Piece(shard, pending, begins, ends))
        chunk_size += size
        pending, size = [], 0
        if ends:
            shard = None
        if chunk_size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, chunk_size = [], 0
    if chunk:
        yield chunk


class Encoder:
    """A tokenizer folder, ready to encode chunks."""

    def __init__(self, tokenizer: Path, dtype: np.dtype):
        loaded = vocabulary.load(tokenizer)
        self._encode = vocabulary.line_encoder(loaded)
        self._unknown = loaded.token_to_id("[UNK]")
        self._dtype = dtype

    def __call__(self, chunk: list[Piece]) -> list[Encoded]:
        """The chunk's tokens by shard, documents in order; lines without tokens left out."""
        lines = [line for piece in chunk for line in piece.lines]
        ids = iter(self._encode(lines))
        entries: list[list[int]] = []  # a list of ids a line, [] = end of document
        shards: list[int] = []  # that each entry goes to
        for piece in chunk:
            own = [line for line in islice(ids, len(piece.lines)) if line] + [[]] * piece.ends
            entries += own
            shards += [piece.shard] * len(own)
        lengths = np.array([len(entry) for entry in entries], LINES_DTYPE)
        tokens = np.fromiter(chain.from_iterable(entries), self._dtype, count=int(lengths.sum()))
        line_shards = np.array(shards, np.int32)
        token_shards = np.repeat(line_shards, lengths)
        begun = Counter(piece.shard for piece in chunk if piece.begins)
        result = []
        for shard in sorted({piece.shard for piece in chunk}):
            mine = tokens[token_shards == shard]
            unknown = int(np.count_nonzero(mine == self._unknown))
            own_lines = lengths[line_shards == shard]
            result.append(Encoded(shard, mine, own_lines, begun[shard], unknown))
        return result


def encode_in_order(
    chunks: Iterable[list[Piece]], tokenizer: Path, dtype: np.dtype, workers: int
) -> Iterator[list[Encoded]]:
    """Encode every chunk, results in the order of the chunks; `workers` > 1 start processes."""
    if workers == 1:
        yield from map(Encoder(tokenizer, dtype), chunks)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer, dtype)
    )
    running: deque = deque()
    try:
        for chunk in chunks:
            running.append(pool.submit(_encode, chunk))
            if len(running) > 2 * workers:  # enough to keep all busy, few enough to bound memory
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool:
        raise FastElectraError(
            "a worker process died, perhaps for lack of memory: try fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(tokenizer: Path, dtype: np.dtype) -> None:
    global _encode_chunk  # noqa: PLW0603  (a pool's initializer has nowhere else to put it)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _encode_chunk = Encoder(tokenizer, dtype)


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(chunk: list[Piece]) -> list[Encoded]:
    return _encode_chunk(chunk)
