"""The generator's vocabulary projection, its cross-entropy, and one exact sample a row.

Two ways: `flash_cross_entropy` never holds logits in memory and pays with a recomputation;
`chunked_cross_entropy`, for wide embeddings, fp32 and older GPUs, holds those of a chunk of rows.
"""

import torch
import torch.nn.functional as F

from . import chunked_cross_entropy, flash_cross_entropy
from .dispatch import use_triton

FLASH_WIDTH = 256  # a tile of wider rows does not fit an SM


def linear_cross_entropy_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of softmax(hidden @ weight.T + bias), and a draw from its tempered form.

    hidden [M, D], weight [V, D], bias [V], labels [M] int32 (-1: no loss for the row), uniforms [M]
    fp32 in [0, 1). A bias of -inf takes a token out of both softmaxes.
    → loss [] fp32: Σ -log softmax(logits)[label]; sampled [M] int32: the first token at which the
    cumulative distribution of softmax(logits / temperature) exceeds the row's uniform, no gradient;
    correct [] fp32: rows whose label has the largest logit, up to rounding.
    """
    inputs = hidden, weight, bias, labels, uniforms, float(temperature)
    narrow = hidden.shape[1] <= FLASH_WIDTH and hidden.element_size() == 2  # tensor cores' types
    if use_triton(hidden) and narrow and _has_room(hidden.device):
        loss, sampled, correct, _ = flash_cross_entropy.forward(*inputs)
    else:
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, weight, bias))
        loss, sampled, correct, *_ = chunked_cross_entropy.forward(*inputs, wanted)
    return loss, sampled, correct


@torch.compiler.assume_constant_result
def _has_room(device: torch.device) -> bool:
    """Whether an SM holds two tiles of the flash way, 128 KB, as it does from Ampere on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def linear_cross_entropy_sample_reference(hidden, weight, bias, labels, uniforms, temperature=1.0):
    """`linear_cross_entropy_sample` in plain PyTorch, all logits at once."""
    statistics = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden, weight, bias).to(statistics)
    loss = F.cross_entropy(logits, labels.long(), ignore_index=-1, reduction="sum")
    with torch.no_grad():
        cumulative = (logits / temperature).softmax(1).cumsum(1)
        goal = (uniforms * cumulative[:, -1])[:, None]
        sampled = torch.searchsorted(cumulative, goal, right=True, out_int32=True)[:, 0]
        target = logits.gather(1, labels.clamp(min=0).long()[:, None])[:, 0]
        correct = (target >= logits.amax(1)) & (labels >= 0)
    return loss, sampled, correct.sum(dtype=torch.float32)
