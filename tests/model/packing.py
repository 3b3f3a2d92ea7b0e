"""Random packed batches, and the same text as the padded rows that transformers takes."""

import torch

from fastelectra.data.batch import Batch

SPECIAL = 5  # ids below are [PAD] [UNK] [CLS] [SEP] [MASK]


def packed_batch(lengths, vocab_size, seed=0, room=(0, 0, 0), max_length=None):
    """A Batch of examples of these lengths with `room` more (tokens, sequences, masked).

    Two segments each; about a sixth of the positions chosen, at least one; the room is padding.
    """
    generator = torch.Generator().manual_seed(seed)
    real = sum(lengths)
    boundaries = torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.randint(SPECIAL, vocab_size, (real,), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths] or [torch.empty(0)])
    segments = torch.cat(
        [(torch.arange(length) >= length // 2 + 1).long() for length in lengths] or [torch.empty(0)]
    )
    chosen = [
        start + torch.randperm(length, generator=generator)[: max(1, length // 6)]
        for start, length in zip(boundaries.tolist(), lengths, strict=False)
    ]
    chosen = torch.cat(chosen or [torch.empty(0)]).long().sort().values
    keep = torch.rand(len(chosen), generator=generator) < 0.15
    total = real + room[0]

    def filled(values, extra, value):
        return torch.cat([values.int(), torch.full((extra,), int(value), dtype=torch.int32)])

    return Batch(
        tokens=filled(tokens, room[0], 0),
        segments=filled(segments, room[0], 0),
        positions=filled(positions, room[0], 0),
        cu_seqlens=filled(boundaries, room[1], real),
        masked_positions=filled(chosen, room[2], total),
        masked_inputs=filled(torch.where(keep, tokens[chosen], 4), room[2], 0),
        labels=filled(tokens[chosen], room[2], -1),
        uniforms=torch.rand(len(chosen) + room[2], generator=generator),
        totals=torch.tensor([len(chosen), real], dtype=torch.float32),
        max_length=max_length or max(lengths, default=8),
        seed=seed,
    )


def padded(batch, tokens):
    """`tokens` [T] of the batch's examples as keyword arguments of a transformers model.

    attention_mask [B, L] picks the packed rows out of its outputs again.
    """
    lengths = batch.cu_seqlens.diff().tolist()
    lengths = [length for length in lengths if length]
    real = sum(lengths)

    def rows(values):
        parts = values[:real].long().split(lengths)
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    return {
        "input_ids": rows(tokens),
        "token_type_ids": rows(batch.segments),
        "attention_mask": rows(torch.ones(real)),
    }


def randomize(electra, seed=0):
    """Give every parameter a value that a mistake would show with: no zeros, no ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in electra.named_parameters():
            parameter.normal_(0, 0.05, generator=generator)
            if name.endswith("norm_weight"):
                parameter.add_(1)
    return electra
