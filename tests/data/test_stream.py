"""The order of batches: independent of ranks and restarts; every token once an epoch."""

import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, fields, replace
from itertools import islice

import numpy as np
import pytest
import torch
from texts import prepare

from fastelectra.config import DataConfig
from fastelectra.data.batch import Batch, BatchShape
from fastelectra.data.counters import key_of
from fastelectra.data.examples import make_plan
from fastelectra.data.shards import Shard, open_corpus
from fastelectra.data.stream import BatchStream, Position, prefetch, shape_for
from fastelectra.errors import FastElectraError

START = Position()


def stream(corpus, batches_per_step=4, seed=0, split="train", tokens=256, max_length=48):
    data = DataConfig(path=str(corpus.path), max_length=max_length)
    shape = BatchShape.of(tokens, max_length, data.mask_fraction)
    return BatchStream(
        corpus.split(split), corpus.special, data, shape, batches_per_step, seed
    )  # fmt: skip


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(Batch)]
    return all(x.equal(y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def real_tokens(batch, special):
    """Token counts without [CLS] and [SEP]."""
    counts = Counter(batch.tokens[: int(batch.cu_seqlens[-1])].tolist())
    del counts[special.cls], counts[special.sep]
    return counts


def test_the_corpus_has_several_shards(sharded_corpus):
    assert len(sharded_corpus.split("train")) >= 4
    assert len(sharded_corpus.split("heldout")) >= 2


@pytest.mark.parametrize("lengths", [[120] * 3000, [15] * 20_000, [120] * 2000 + [15] * 16_000])
def test_batches_have_room_for_their_examples_and_little_more(lengths):
    """Also where short documents come after all the long ones."""
    lines = np.stack([lengths, np.zeros_like(lengths)], 1).reshape(-1).astype(np.uint32)
    shard = Shard(np.full(sum(lengths), 9, np.uint16), lines)
    data = DataConfig(path="made up", max_length=128)
    shape = shape_for([shard], data, 4096)
    plan, free = (
        make_plan(shard.tokens, lines, 128, 0.15, False, room, key_of(1, 2))
        for room in (shape, replace(shape, sequences=4096))
    )
    assert len(plan) < 1.02 * len(free)
    assert shape.sequences < 2 * np.diff(plan.bounds).mean()


def test_the_shape_of_a_damaged_shard_is_an_error():
    shard = Shard(np.full(5, 9, np.uint16), np.array([4, 0], np.uint32))
    with pytest.raises(FastElectraError, match="a shard is damaged"):
        shape_for([shard], DataConfig(path="made up"), 1024)


def test_every_token_appears_once_an_epoch(sharded_corpus):
    expected = Counter()
    for shard in sharded_corpus.split("train"):
        expected.update(shard.tokens.tolist())
    seen: dict[int, Counter] = {0: Counter(), 1: Counter()}
    orders: dict[int, list] = {0: [], 1: []}
    steps = stream(sharded_corpus, batches_per_step=1).steps(START, 0, 0, 1)
    for (batch,), position in steps:
        if position.epoch == 2:
            break
        seen[position.epoch] += real_tokens(batch, sharded_corpus.special)
        orders[position.epoch].append(batch.tokens.tolist())
    assert seen == {0: expected, 1: expected}
    assert orders[0] != orders[1]
    assert sorted(orders[0]) != sorted(orders[1])


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_together_see_the_same_step(sharded_corpus, world):
    steps = 140  # beyond an epoch
    alone = list(islice(stream(sharded_corpus).steps(START, 5, 0, 1), steps))
    ranks = [
        list(islice(stream(sharded_corpus).steps(START, 5, rank, world), steps))
        for rank in range(world)
    ]
    for step, (batches, position) in enumerate(alone):
        together = [None] * 4
        for rank in range(world):
            mine, after = ranks[rank][step]
            assert after == position
            together[rank::world] = mine
        assert all(same(a, b) for a, b in zip(batches, together, strict=True))
    assert alone[-1][1].epoch >= 1


def test_totals_are_those_of_the_whole_step(sharded_corpus):
    for batches, _ in islice(stream(sharded_corpus).steps(START, 0, 0, 1), 5):
        masked = sum(int((batch.labels >= 0).sum()) for batch in batches)
        tokens = sum(int(batch.cu_seqlens[-1]) for batch in batches)
        assert all(batch.totals.tolist() == [masked, tokens] for batch in batches)


def test_a_restart_anywhere_goes_on_identically(sharded_corpus):
    whole = list(islice(stream(sharded_corpus).steps(START, 0, 0, 1), 140))
    for step in range(0, 140, 9):
        saved = asdict(whole[step][1])
        assert all(isinstance(value, int) for value in saved.values())
        again = stream(sharded_corpus).steps(Position(**saved), step + 1, 0, 1)
        for (batches, position), (expected, after) in zip(
            islice(again, 7), whole[step + 1 : step + 8], strict=False
        ):
            assert position == after
            assert all(same(a, b) for a, b in zip(batches, expected, strict=True))


def test_seeds_differ_in_order_masks_and_dropout(corpus):
    first, second = (next(stream(corpus, seed=seed).steps(START, 0, 0, 1))[0][0] for seed in (0, 1))
    assert not first.tokens.equal(second.tokens)
    assert first.seed != second.seed


def test_dropout_seeds_are_all_different(corpus):
    steps = islice(stream(corpus).steps(START, 0, 0, 1), 50)
    seeds = [batch.seed for batches, _ in steps for batch in batches]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_shapes_are_constant(corpus):
    shape = BatchShape.of(256, 48, 0.15)
    for batches, _ in islice(stream(corpus).steps(START, 0, 0, 1), 20):
        for batch in batches:
            assert batch.tokens.shape == batch.segments.shape == batch.positions.shape == (256,)
            assert batch.cu_seqlens.shape == (shape.sequences + 1,)
            assert batch.labels.shape == batch.uniforms.shape == (shape.masked,)
            assert batch.tokens.dtype == batch.cu_seqlens.dtype == batch.labels.dtype == torch.int32
            assert batch.max_length == 48


def test_evaluation_repeats_and_does_not_depend_on_the_seed(sharded_corpus):
    runs = [
        list(stream(sharded_corpus, seed=seed, split="heldout").evaluation(10**9, 0, 1))
        for seed in (0, 1)
    ]
    assert all(same(a, b) for a, b in zip(*runs, strict=True))
    seen = sum((real_tokens(batch, sharded_corpus.special) for batch in runs[0]), Counter())
    expected = sum(len(shard.tokens) for shard in sharded_corpus.split("heldout"))
    assert seen.total() == expected
    tokens = sum(int(batch.cu_seqlens[-1]) for batch in runs[0])
    assert all(batch.totals[1] == tokens for batch in runs[0])


def test_evaluation_stops_at_the_token_limit(corpus):
    tokens = [
        int(batch.cu_seqlens[-1])
        for batch in stream(corpus, split="heldout").evaluation(1000, 0, 1)
    ]
    assert sum(tokens[:-1]) < 1000 <= sum(tokens)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_evaluation_is_shared_evenly(sharded_corpus, world):
    alone = list(stream(sharded_corpus, split="heldout").evaluation(3000, 0, 1))
    ranks = [
        list(stream(sharded_corpus, split="heldout").evaluation(3000, rank, world))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    together = [batch for group in zip(*ranks, strict=True) for batch in group]
    assert all(same(a, b) for a, b in zip(alone, together, strict=False))
    for empty in together[len(alone) :]:
        assert not empty.cu_seqlens.any()
        assert (empty.labels == -1).all()
        assert (empty.masked_positions == 256).all()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "a.txt").write_text("The chef cooked the meal.\n\nThe guest ate it.\n")
    assert prepare(folder / "a.txt", "--out", folder / "out", "--vocab-size", 60) == 0
    return open_corpus(folder / "out")


def test_a_corpus_smaller_than_a_step_runs_through_several_epochs(tiny):
    batches, position = next(stream(tiny).steps(START, 0, 0, 1))
    assert position == Position(3, 0, 1)
    assert all(int(batch.cu_seqlens[-1]) > 0 for batch in batches)
    (heldout,) = stream(tiny, split="heldout").evaluation(500, 0, 1)
    assert int(heldout.cu_seqlens[-1]) == len(["the", "guest", "ate", "it", "."]) + 2


class TestPrefetch:
    def test_keeps_the_order(self):
        assert list(prefetch(iter(range(100)), 3)) == list(range(100))

    def test_works_ahead(self):
        made = []
        items = prefetch((made.append(n) or n for n in range(10)), 4)
        assert next(items) == 0
        deadline = time.monotonic() + 10
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 5 <= len(made) <= 6
        assert list(items) == list(range(1, 10))

    def test_passes_exceptions_on(self):
        def failing():
            yield 1
            raise FastElectraError("shard is damaged")

        items = prefetch(failing(), 2)
        assert next(items) == 1
        with pytest.raises(FastElectraError, match="damaged"):
            next(items)

    @pytest.mark.parametrize("taken", [0, 1])
    def test_the_thread_ends_when_the_consumer_leaves(self, taken):
        before = threading.active_count()
        items = prefetch(iter(range(10**9)), 2)
        assert list(islice(items, taken)) == list(range(taken))
        items.close()
        deadline = time.monotonic() + 10
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() == before

    def test_the_interpreter_ends_in_the_middle_of_native_work(self):
        """A daemon thread that comes back from numba code after the exit would abort it."""
        program = (
            "import numpy as np\n"
            "from fastelectra.data.counters import permutation\n"
            "from fastelectra.data.stream import prefetch\n"
            "permutation(np.uint64(1), 10)\n"
            "items = prefetch((permutation(np.uint64(1), 3_000_000) for _ in range(99)), 2)\n"
            "next(items)\n"
            "print('done')\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")
