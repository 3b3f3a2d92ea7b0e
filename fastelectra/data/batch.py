"""The one thing that crosses from data to model: packed, masked examples in fixed shapes."""

import dataclasses
import threading
from dataclasses import dataclass

import torch

pinning = threading.Lock()  # hold it where no other thread may allocate page-locked memory


@dataclass(frozen=True)
class BatchShape:
    """Fixed sizes of every Batch of a run; constant shapes mean no recompiles.

    (Those of held-out text may hold another number of examples.)
    """

    tokens: int  # T: token budget
    sequences: int  # S: most examples in a batch
    masked: int  # M: most chosen positions in a batch

    @classmethod
    def of(
        cls, tokens: int, max_length: int, mask_fraction: float, mean_length: float = 1
    ) -> "BatchShape":
        """Sizes for a token budget: room for chosen positions as full-length examples have them,
        and for half as many examples again as fit on average, of 16 tokens or more."""
        per_example = masked_count(max_length, mask_fraction)
        masked = -(-tokens // max_length) * per_example
        sequences = int(1.5 * tokens / max(mean_length, 1.5 * min(16, max_length)))
        return cls(tokens, max(1, sequences), -(-masked // 64) * 64)


def masked_count(length: int, mask_fraction: float) -> int:
    """How many positions of an example of `length` real tokens are chosen: max(1, round(p·n)).

    At most length − 2 or − 3: [CLS] and [SEP] are never chosen; the masker clips.
    """
    return max(1, round(mask_fraction * length))


@dataclass
class Batch:
    """Examples packed one after another into [T], each with its own [CLS], segments, positions.

    Rows after the last example (cu_seqlens[-1]) are padding; chosen positions are padded with T.
    """

    tokens: torch.Tensor  # [T] int32: original ids; 0 in padding
    segments: torch.Tensor  # [T] int32: 0 for [CLS] A [SEP], 1 for B [SEP]
    positions: torch.Tensor  # [T] int32: from 0 in each example
    cu_seqlens: torch.Tensor  # [S+1] int32: example boundaries, padded by repeating the last
    masked_positions: torch.Tensor  # [M] int32: chosen positions, ascending; T = padding
    masked_inputs: torch.Tensor  # [M] int32: what the generator sees there: [MASK] or the original
    labels: torch.Tensor  # [M] int32: original ids there; -1 = padding
    uniforms: torch.Tensor  # [M] float32 in [0, 1): one draw a chosen position, for sampling
    totals: torch.Tensor  # [2] float32: chosen positions and real tokens of the whole global batch
    max_length: int  # bound on the length of an example, the same in every batch of a run
    seed: int  # of this batch's dropout: hash of (seed, step, place in the global batch)

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked host memory."""
        with pinning:
            return self._map(torch.Tensor.pin_memory)

    def _map(self, change) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: change(value) if isinstance(value, torch.Tensor) else value
                        for name, value in values.items()})  # fmt: skip
