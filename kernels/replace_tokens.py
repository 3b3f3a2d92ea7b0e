"""The discriminator's input: the generator's samples written into the text, and what changed.

One pass over the tokens, each finding its place among the chosen positions by binary search, where
separate operations copy, scatter, compare and count.
"""

import torch

from .dispatch import operation, use_triton
from .language import find, jit, tl

BLOCK = 512  # tokens of a program


@jit
def _forward(
    tokens_ptr, positions_ptr, sampled_ptr, corrupted_ptr, replaced_ptr, count_ptr,
    rows, chosen, steps, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens_ptr + row, row < rows, 0)
    place, found = find(positions_ptr, row, chosen, steps)
    corrupted = tl.load(sampled_ptr + place, found & (row < rows), 0)
    corrupted = tl.where(found, corrupted, token)
    replaced = tl.where(row < rows, corrupted != token, 0).to(tl.int32)
    tl.store(corrupted_ptr + row, corrupted, row < rows)
    tl.store(replaced_ptr + row, replaced, row < rows)
    # whole numbers: exact, so the same in any order
    tl.atomic_add(count_ptr, tl.sum(replaced, 0).to(tl.float32))


@operation("replace_tokens")
def forward(
    tokens: torch.Tensor, positions: torch.Tensor, sampled: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ corrupted [T], replaced [T], count []."""
    outputs = _forward_outputs(tokens)
    rows, chosen = tokens.shape[0], positions.shape[0]
    _forward[(-(-rows // BLOCK),)](
        tokens, positions, sampled, *outputs, rows, chosen, chosen.bit_length(), BLOCK=BLOCK
    )
    return outputs


@forward.register_fake
def _forward_outputs(tokens, *_):
    count = tokens.new_zeros((), dtype=torch.float32)
    return tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape), count


def replace_tokens(
    tokens: torch.Tensor, positions: torch.Tensor, sampled: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write sampled [M] int32 at positions [M] int32 of tokens [T] int32.

    → corrupted [T] int32; replaced [T] int32, 1 where the token now differs; count [] fp32, their
    number. Positions ascend without repetition, then any number of T: those write nothing.
    """
    path = forward if use_triton(tokens) else replace_tokens_reference
    return path(tokens, positions, sampled)


def replace_tokens_reference(tokens, positions, sampled):
    """`replace_tokens` in plain PyTorch."""
    spare = torch.cat([tokens, tokens.new_zeros(1)])  # padding writes to the row beyond the last
    corrupted = spare.index_copy(0, positions.long(), sampled)[:-1]
    replaced = (corrupted != tokens).to(torch.int32)
    return corrupted, replaced, replaced.sum(dtype=torch.float32)
