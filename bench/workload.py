"""What the contenders train on: the trainer's own batches, packed for it and padded for its peers.

full     every example has exactly the full length: no padding for anyone
ragged   one-segment examples with lengths uniform between an eighth of it and all of it
corpus   examples by Google's rule from a prepared corpus
"""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from options import ROOT

from fastelectra.config import Config, load_config
from fastelectra.data.batch import Batch
from fastelectra.data.shards import Shard, open_corpus
from fastelectra.data.stream import BatchStream, Position, shape_for
from fastelectra.data.vocabulary import SpecialTokens
from fastelectra.training.launch import Process

VOCABULARY = 30_522  # of the paper's uncased WordPiece
SPECIAL = SpecialTokens(pad=0, unk=100, cls=101, sep=102, mask=103)
FIRST_WORD = 999  # ids below belong to special and unused entries
SHARD_TOKENS = 2_000_000  # of made-up text, about


@dataclass(frozen=True)
class Workload:
    """A preset at the sizes of this run, and its batches."""

    config: Config
    lengths: str  # full, ragged or corpus
    vocab_size: int
    stream: BatchStream

    def steps(self, process: Process = Process(0, 1)) -> Iterator[list[Batch]]:  # noqa: B008
        """This rank's micro-batches of each step, without end."""
        for batches, _ in self.stream.steps(Position(), 0, process.rank, process.world):
            yield batches

    def attended(self) -> Config:
        """The configuration whose FLOPs are those of these examples.

        A token of an example of n attends to n tokens: the mean over tokens stands for the length,
        and the share chosen is counted, not set.
        """
        lengths, chosen = [], 0
        for batch, _ in zip(self.steps(), range(8), strict=False):
            for part in batch:
                lengths += [n for n in part.cu_seqlens.diff().tolist() if n]
                chosen += int((part.labels >= 0).sum())
        mean = round(sum(n * n for n in lengths) / sum(lengths))
        data = dataclasses.replace(
            self.config.data, max_length=mean, mask_fraction=chosen / sum(lengths)
        )
        return dataclasses.replace(self.config, data=data)


def make_workload(
    size: str, seq: int | None, tokens: int | None, micro: int | None, lengths: str,
    dtype: str, data: Path,
) -> Workload:  # fmt: skip
    """Sizes that are None are the preset's; a step is one micro-batch unless `micro` says less.

    Raises FastElectraError for sizes that do not fit together or a corpus that is not there.
    """
    file = ROOT / "configs" / f"{size}.json"
    preset = load_config(file)
    tokens = tokens or preset.training.micro_batch_tokens
    config = load_config(file, [
        f"data.max_length={seq or preset.data.max_length}", f"data.path={data}",
        f"training.batch_tokens={tokens}", f"training.micro_batch_tokens={micro or tokens}",
        f"deepspeed.bf16.enabled={'true' if dtype == 'bf16' else 'false'}",
    ])  # fmt: skip
    length, micro = config.data.max_length, config.training.micro_batch_tokens
    if lengths == "corpus":
        corpus = open_corpus(data)
        shards, special, vocab_size = corpus.split("train"), corpus.special, corpus.vocab_size
    else:
        low = length - 2 if lengths == "full" else max(1, length // 8 - 2)
        batches = max(4, SHARD_TOKENS // micro)
        shard = made_up(low, length - 2, batches * (micro // length))  # full: whole batches only
        shards, special, vocab_size = [shard], SPECIAL, VOCABULARY
    shape, training = shape_for(shards, config.data, micro), config.training
    stream = BatchStream(shards, special, config.data, shape, training.micro_batches, training.seed)
    return Workload(config, lengths, vocab_size, stream)


def made_up(shortest: int, longest: int, documents: int) -> Shard:
    """Documents of one line, of lengths uniform between both; words as frequent as Zipf's law."""
    random = np.random.default_rng(0)
    lines = random.integers(shortest, longest + 1, documents)
    frequency = np.cumsum(1 / np.arange(1, VOCABULARY - FIRST_WORD + 1))
    words = np.searchsorted(frequency, random.random(lines.sum()) * frequency[-1])
    ends = np.stack([lines, np.zeros_like(lines)], 1).reshape(-1)  # a document after each line
    return Shard((FIRST_WORD + words).astype(np.uint16), ends.astype(np.uint32))


@dataclass(frozen=True)
class Padded:
    """A batch as [B, L] int64 matrices, L the longest example's length: what peers train on."""

    tokens: torch.Tensor  # [B, L] original ids; 0 in padding
    inputs: torch.Tensor  # [B, L] what the generator sees
    segments: torch.Tensor  # [B, L]
    labels: torch.Tensor  # [B, L] original ids at the chosen positions, −100 elsewhere
    chosen: torch.Tensor  # [M] those positions in the flattened matrices
    mask: torch.Tensor | None  # [B, L] 1 for real tokens; None where there is no padding

    def _map(self, change) -> "Padded":
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Padded(*(None if value is None else change(value) for value in values))

    def to(self, device: torch.device) -> "Padded":
        """The batch on `device`; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Padded":
        """The batch in page-locked host memory."""
        return self._map(torch.Tensor.pin_memory)


def padded(batch: Batch) -> Padded:
    """The examples of a packed batch, one a row."""
    starts = batch.cu_seqlens.long()
    lengths = starts.diff()
    lengths = lengths[lengths > 0]
    rows, width, real = len(lengths), int(lengths.max()), int(lengths.sum())
    row = torch.repeat_interleave(torch.arange(rows), lengths)  # [real]
    place = row * width + batch.positions[:real]

    def matrix(values: torch.Tensor, fill: int, where: torch.Tensor) -> torch.Tensor:
        flat = torch.full((rows * width,), fill, dtype=torch.int64)
        flat[where] = values.long()
        return flat.view(rows, width)

    count = int((batch.labels >= 0).sum())
    chosen = place[batch.masked_positions[:count].long()]
    tokens = matrix(batch.tokens[:real], 0, place)
    inputs = tokens.clone()
    inputs.view(-1)[chosen] = batch.masked_inputs[:count].long()
    return Padded(
        tokens, inputs, matrix(batch.segments[:real], 0, place),
        matrix(batch.labels[:count], -100, chosen), chosen,
        None if real == rows * width else matrix(torch.ones(real), 0, place),
    )  # fmt: skip


def data_rate(workload: Workload, seconds: float = 1.0) -> float:
    """Real tokens a core loads, cuts, packs and masks a second, with nothing to wait for."""
    steps = workload.steps()
    next(steps)  # compiles
    tokens, start = 0.0, time.thread_time()  # of this thread alone, whatever else is running
    while (spent := time.thread_time() - start) < seconds:
        tokens += float(next(steps)[0].totals[1])
    return tokens / spent
