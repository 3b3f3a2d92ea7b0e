"""The training batches, in an order that depends on nothing but corpus, settings and seed."""

import atexit
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastelectra.config import DataConfig
from fastelectra.data.batch import Batch, BatchShape
from fastelectra.data.counters import key_of, permutation
from fastelectra.data.examples import Plan, fill, make_plan, mean_length
from fastelectra.data.shards import Shard
from fastelectra.data.vocabulary import SpecialTokens
from fastelectra.errors import FastElectraError

_SHARD_ORDER, _PLAN, _DROPOUT, _EVALUATION = range(4)  # what a key is for


@dataclass(frozen=True)
class Position:
    """Where the next batch is. The default is the start of a run."""

    epoch: int = 0
    shard: int = 0  # place in the epoch's order of shards
    batch: int = 0  # of that shard's plan


def shape_for(shards: Sequence[Shard], data: DataConfig, tokens: int) -> BatchShape:
    """The shape of batches of so many tokens of these shards.

    Attention on GPUs spends time on every example that there is room for, also where there is none:
    the room is what the first shard's examples need. Raises FastElectraError for a damaged one.
    """
    mean = mean_length(_sound(shards[0], data).lines, data.max_length)
    return BatchShape.of(tokens, data.max_length, data.mask_fraction, mean)


def _sound(shard: Shard, data: DataConfig) -> Shard:
    if not shard.is_sound():
        raise FastElectraError(f"{data.path}: a shard is damaged: prepare it again")
    return shard


class BatchStream:
    """Packed, masked batches of one split of a corpus."""

    def __init__(
        self,
        shards: Sequence[Shard],
        special: SpecialTokens,
        data: DataConfig,
        shape: BatchShape,
        batches_per_step: int,
        seed: int,
    ):
        self.shards, self.data, self.shape = list(shards), data, shape
        self.batches_per_step, self.seed = batches_per_step, seed
        self._special = np.array([special.cls, special.sep, special.mask], np.int32)

    def steps(
        self, position: Position, step: int, rank: int, world: int
    ) -> Iterator[tuple[list[Batch], Position]]:
        """Without end: this rank's micro-batches of each step, and the position after the step.

        `step` is the number of the first one. Batch b of a step goes to rank b mod `world`, which
        divides the batches of a step.
        """
        upcoming = self._places(position)
        while True:
            places = [next(upcoming) for _ in range(self.batches_per_step)]
            totals = _totals((plan, batch) for plan, batch, _ in places)
            batches = [
                self._fill(*places[b][:2], totals, int(key_of(_DROPOUT, self.seed, step, b)) >> 1)
                for b in range(rank, self.batches_per_step, world)
            ]
            yield batches, places[-1][2]
            step += 1

    def evaluation(self, max_tokens: int, rank: int, world: int) -> Iterator[Batch]:
        """Once, about `max_tokens` tokens in the same batches with the same masks every time.

        The seed of the run has no part in it, so that runs compare. Every rank gets the same
        number of batches, the last ones maybe empty; totals are those of the whole evaluation.
        """
        places, tokens = [], 0
        for number in range(len(self.shards)):
            plan = self._plan(number, key_of(_EVALUATION, number))
            for batch in range(len(plan)):
                if tokens < max_tokens:
                    places.append((plan, batch))
                    tokens += plan.real[batch]
            if tokens >= max_tokens:
                break
        totals = _totals(places)
        empty = (plan, None)
        for b in range(rank, -(-len(places) // world) * world, world):
            yield self._fill(*(places[b] if b < len(places) else empty), totals, b)

    def _places(self, position: Position) -> Iterator[tuple[Plan, int, Position]]:
        """From `position` on: each batch's plan, its number there, and the position after it."""
        epoch, shard, batch = position.epoch, position.shard, position.batch
        while True:
            order = permutation(key_of(_SHARD_ORDER, self.seed, epoch), len(self.shards))
            for place in range(shard, len(order)):
                number = int(order[place])
                plan = self._plan(number, key_of(_PLAN, self.seed, epoch, number))
                for b in range(batch, len(plan)):
                    yield plan, b, Position(epoch, place, b + 1)
                batch = 0
            epoch, shard = epoch + 1, 0

    def _plan(self, number: int, key: np.uint64) -> Plan:
        data = self.data
        shard = _sound(self.shards[number], data)
        return make_plan(
            shard.tokens, shard.lines, data.max_length, data.mask_fraction, data.google_parity,
            self.shape, key,
        )  # fmt: skip

    def _fill(self, plan: Plan, batch: int | None, totals: torch.Tensor, seed: int) -> Batch:
        """Batch number `batch` of the plan; None: a batch of padding only."""
        shape = self.shape
        ids = np.zeros((3, shape.tokens), np.int32)
        masks = np.empty((3, shape.masked), np.int32)
        masks[0], masks[1], masks[2] = shape.tokens, 0, -1
        boundaries = np.zeros(shape.sequences + 1, np.int32)
        uniforms = np.zeros(shape.masked, np.float32)
        if batch is not None:
            fill(
                plan.tokens, plan.order[plan.bounds[batch] : plan.bounds[batch + 1]],
                plan.starts, plan.first, plan.second, plan.quota, self.data.google_parity,
                plan.key, self._special, ids, masks, boundaries, uniforms,
            )  # fmt: skip
        tokens, segments, positions = torch.from_numpy(ids)
        masked_positions, masked_inputs, labels = torch.from_numpy(masks)
        return Batch(
            tokens, segments, positions, torch.from_numpy(boundaries), masked_positions,
            masked_inputs, labels, torch.from_numpy(uniforms), totals, self.data.max_length, seed,
        )  # fmt: skip


def _totals(places) -> torch.Tensor:
    counts = [(plan.masked[batch], plan.real[batch]) for plan, batch in places]
    return torch.tensor(np.sum(counts, axis=0), dtype=torch.float32)


def prefetch(iterator: Iterator, depth: int) -> Iterator:
    """The same items, `depth` of them made ahead in a daemon thread; its exceptions pass on.

    The thread starts when the first item is asked for.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(kind: str, value) -> None:
        while not stopped.is_set():
            try:
                return ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in iterator:
                put("item", item)
                if stopped.is_set():
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    def stop() -> None:
        stopped.set()
        worker.join()

    worker = threading.Thread(target=work, name="prefetch", daemon=True)
    worker.start()
    atexit.register(stop)  # a thread in native code at the interpreter's exit would abort it
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop()
        atexit.unregister(stop)
