"""The discriminator's input: the generator's samples written into the text, and what changed."""

import torch


def replace_tokens(
    tokens: torch.Tensor, positions: torch.Tensor, sampled: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write sampled [M] int32 at positions [M] int32 of tokens [T] int32.

    → corrupted [T] int32; replaced [T] int32, 1 where the token now differs; count [] fp32, their
    number. Positions ascend without repetition, then any number of T: those write nothing.
    """
    return replace_tokens_reference(tokens, positions, sampled)


def replace_tokens_reference(tokens, positions, sampled):
    """`replace_tokens` in plain PyTorch."""
    spare = torch.cat([tokens, tokens.new_zeros(1)])  # padding writes to the row beyond the last
    corrupted = spare.index_copy(0, positions.long(), sampled)[:-1]
    replaced = (corrupted != tokens).to(torch.int32)
    return corrupted, replaced, replaced.sum(dtype=torch.float32)
