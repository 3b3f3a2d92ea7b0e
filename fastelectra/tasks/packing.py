"""Texts to token ids, and any number of examples to one packed batch without padding."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from fastelectra.data.words import LineEncoder


@dataclass(frozen=True)
class Example:
    """[CLS] A [SEP] or [CLS] A [SEP] B [SEP]."""

    tokens: np.ndarray  # int32
    first: int  # how many of them belong to [CLS] A [SEP]
    cut: bool  # whether the texts had more


@dataclass(frozen=True)
class Packed:
    """Examples one after another; T tokens, S examples, and padding if cu_seqlens ends before T."""

    tokens: torch.Tensor  # [T] int32
    segments: torch.Tensor  # [T] int32: 0 for [CLS] A [SEP], 1 for B [SEP]
    positions: torch.Tensor  # [T] int32: from 0 in each example
    cu_seqlens: torch.Tensor  # [S+1] int32: where examples begin, and the last one ends
    max_length: int  # bound on the length of an example

    def to(self, device: torch.device) -> "Packed":
        """The batch on `device`."""
        values = (getattr(self, entry.name) for entry in fields(self))
        return type(self)(*(v.to(device) if isinstance(v, torch.Tensor) else v for v in values))


@dataclass(frozen=True)
class Labelled(Packed):
    """What a training step takes."""

    labels: torch.Tensor  # [S] float32


def encode(
    encoder: LineEncoder,
    special: dict[str, int],
    texts: Sequence[tuple[str, ...]],
    max_length: int,
) -> list[Example]:
    """An example for each one or two texts, cut to `max_length` tokens by Google's rule.

    The longer of two texts loses its last token, the second if they are equal, until both fit. An
    empty second text is none.
    """
    columns = [encoder(column) for column in zip(*texts, strict=True)]
    examples = []
    for ids in zip(*columns, strict=True):
        a, b = ids[0], ids[1] if len(ids) == 2 else []
        room = max_length - (3 if b else 2)
        over = max(0, len(a) + len(b) - room)
        from_longer = min(over, abs(len(a) - len(b)))
        kept = [len(a), len(b)]
        kept[len(b) > len(a)] -= from_longer
        rest = over - from_longer
        kept = [kept[0] - rest // 2, kept[1] - (rest + 1) // 2]
        tokens = [special["cls"], *a[: kept[0]], special["sep"]]
        first = len(tokens)
        if b:
            tokens += [*b[: kept[1]], special["sep"]]
        examples.append(Example(np.array(tokens, np.int32), first, over > 0))
    return examples


def pack(examples: Sequence[Example], max_length: int, multiple: int = 1) -> Packed:
    """Lay examples one after another; padding makes the number of tokens a `multiple`."""
    lengths = np.array([len(example.tokens) for example in examples])
    bounds = np.concatenate([[0], lengths.cumsum()])
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    segments = positions >= np.repeat([example.first for example in examples], lengths)
    tokens = np.concatenate([example.tokens for example in examples])
    padding = -len(tokens) % multiple
    arrays = (*(np.pad(array, (0, padding)) for array in (tokens, segments, positions)), bounds)
    return Packed(*(torch.from_numpy(array.astype(np.int32)) for array in arrays), max_length)
