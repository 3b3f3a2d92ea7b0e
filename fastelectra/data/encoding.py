"""Documents to token arrays: cut into chunks, encoded by worker processes, in a fixed order."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from fastelectra.data import vocabulary
from fastelectra.errors import FastElectraError

CHUNK_CHARACTERS = 1 << 20  # text handed to a worker at a time; a longer document is cut
LINE_OVERHEAD = 32  # characters that a line counts for besides its own: many lines take memory too
MOST_DEATHS = 3  # of workers over one chunk
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
            size += len(line) + LINE_OVERHEAD
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
    team = [_Worker(tokenizer, dtype) for _ in range(workers)]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in team:
        idle.put(worker)

    def encode(chunk: list[Piece]) -> list[Encoded]:
        worker = idle.get()
        try:
            return worker.encode(chunk)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(workers)
    running: deque[Future] = deque()
    try:
        for chunk in chunks:
            running.append(threads.submit(encode, chunk))
            if len(running) > 2 * workers:  # enough to keep all busy, few enough to bound memory
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in team:
            worker.stop()


class _Worker:
    """A process that encodes, and another in its place when it dies.

    It has a pipe of its own, which ends with it; in one shared by several workers, as those of
    ProcessPoolExecutor are, half a message of a dead one would be waited for forever.
    """

    def __init__(self, *arguments):
        self._arguments = arguments
        self._stopped = False
        self._changing = threading.Lock()  # the process: a thread may start it, another stop it
        self._start()

    def encode(self, chunk: list[Piece]) -> list[Encoded]:
        """The chunk's tokens; FastElectraError when one process after another dies of it."""
        for _ in range(MOST_DEATHS):
            try:
                self._pipe.send(chunk)
                return self._pipe.recv()
            except (EOFError, OSError):
                if self._stopped:
                    raise
            self._replace()
        raise FastElectraError(
            "worker processes keep dying, perhaps for lack of memory: try fewer --workers"
        )

    def stop(self) -> None:
        """End the process, whatever it is doing; there is no other then."""
        with self._changing:
            self._stopped = True
            self._end()

    def _replace(self) -> None:
        with self._changing:
            if not self._stopped:
                print("a worker process died: another one goes on", file=sys.stderr, flush=True)
                self._end()
                self._start()

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        with theirs:
            process = spawn.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
            process.start()
        self._process = process  # one that has started, so that it can be ended

    def _end(self) -> None:
        self._process.kill()
        self._process.join()


def _work(pipe: Connection, tokenizer: Path, dtype: np.dtype) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encode = Encoder(tokenizer, dtype)
    with suppress(EOFError, ConnectionError):  # the parent has gone
        while True:
            pipe.send(encode(pipe.recv()))
