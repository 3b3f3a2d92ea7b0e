"""Attention over packed sequences, and the one place where its implementation is chosen.

Every row of the packed buffer belongs to a sequence and attends to that sequence only. The rows of
padding at the end are made sequences of their own: libraries leave rows that belong to none
unwritten, and a NaN there would reach the weights through the gradients' matrix products.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch

from fastelectra.errors import FastElectraError
from fastelectra.kernels import dispatch, packed_attention, split_qkv


@dataclass(frozen=True)
class Layout:
    """Which rows attend to which; made once a forward pass, shared by all layers and networks."""

    cu_seqlens: torch.Tensor  # [N+1] int32: boundaries, the last = T; zero-length ones are harmless
    max_length: int  # bound on the length of a sequence


def layout_of(cu_seqlens: torch.Tensor, tokens: int, max_length: int) -> Layout:
    """The layout of `tokens` rows of which cu_seqlens [S+1] int32 are examples.

    Shapes depend on S, `tokens` and `max_length` only, and nothing waits for the GPU.
    """
    chunks = torch.arange(1, -(-tokens // max_length) + 1, device=cu_seqlens.device)
    padding = (cu_seqlens[-1] + chunks * max_length).clamp(max=tokens).int()
    return Layout(torch.cat([cu_seqlens, padding]), max_length)


def attention(
    qkv: torch.Tensor, layout: Layout, dropout: float, seed: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """softmax(q kᵀ / √d) v within each sequence: [T, 3, heads, d] → [T, heads, d].

    `dropout` is the share of attention probabilities dropped; its mask comes from `seed` [1] int64
    if the implementation is ours, else from torch's default generator. `bias` [3·heads·d] has been
    added to qkv, by a product that was given a detached one: it gets its gradient here.
    """
    name = backend(qkv.device, qkv.dtype, qkv.shape[-1], dropout > 0, dispatch.for_gpus())
    if name in OURS:
        return packed_attention(qkv, bias, layout.cu_seqlens, layout.max_length, dropout, seed)
    return BACKENDS[name](*split_qkv(qkv, bias), layout.cu_seqlens, layout.max_length, dropout)


def describe(device: torch.device, dtype: torch.dtype, head_size: int, dropout: float) -> str:
    """The implementation in use, for the start-up report."""
    name = backend(device, dtype, head_size, dropout > 0, dispatch.for_gpus())
    return f"attention: {name}"


@cache
def backend(
    device: torch.device, dtype: torch.dtype, head_size: int, dropout: bool, kernels: str
) -> str:
    """The implementation for this device and type: one of OURS or of BACKENDS."""
    if device.type != "cuda":
        return choose(None, dtype, head_size, dropout, kernels, frozenset())
    capability = torch.cuda.get_device_capability(device)
    return choose(capability, dtype, head_size, dropout, kernels, installed())


def choose(
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_size: int,
    dropout: bool,
    kernels: str,
    packages: frozenset[str],
) -> str:
    """The choice itself. `capability` is CUDA's (major, minor), None on CPU; kernels: auto, triton
    or torch. On Hopper with dropout Triton was ahead of "torch flash" by 7% of a step
    (bench/results/h100-80gb-hbm3-2026-11-27-experiments-*.json).

    Raises FastElectraError for a head size that no GPU implementation takes.
    """
    if capability is None:
        return "packed"
    if head_size % 8 or head_size > 256:
        raise FastElectraError(
            f"a head size of {head_size} (hidden_size / heads) cannot run on a GPU: choose"
            " model.heads so that both networks have a multiple of 8, at most 256"
        )
    if dtype == torch.float32 or capability < (8, 0):
        return "memory-efficient"  # the others take 16 bit only, from Ampere on
    ahead = kernels == "triton" or (kernels == "auto" and dropout and capability[0] == 9)
    if ahead and head_size <= 64:  # more takes more registers than there are
        return "Triton"
    if dropout and "flash-attn 2" in packages:
        return "flash-attn 2"
    new = capability[0] in (9, 10) and head_size in (64, 96, 128)
    if not dropout and new and "flash-attn 4" in packages:
        return "flash-attn 4"
    return "torch flash"  # not varlen_attn: it may be cuDNN's, which need not know empty sequences


@torch.compiler.assume_constant_result
def installed() -> frozenset[str]:
    """The optional packages that are there. Both live in `flash_attn`; 2 has a compiled part."""
    packages = set()
    if importlib.util.find_spec("flash_attn_2_cuda"):
        packages.add("flash-attn 2")
    if importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
        packages.add("flash-attn 4")
    return frozenset(packages)


def _torch_flash(q, k, v, cu, longest: int, dropout: float) -> torch.Tensor:
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu, cu, longest, longest, dropout, False, False
    )[0]


def _torch_efficient(q, k, v, cu, longest: int, dropout: float) -> torch.Tensor:
    longest = min(longest, len(q))  # its backward takes no larger bound
    q, k, v = (part.unsqueeze(0) for part in (q, k, v))  # (1, T, heads, d)
    return torch.ops.aten._efficient_attention_forward(
        q, k, v, None, cu, cu, longest, longest, dropout, 0, q.requires_grad
    )[0].squeeze(0)


def _flash_attn_2(q, k, v, cu, longest: int, dropout: float) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, dropout)


def _flash_attn_4(q, k, v, cu, longest: int, dropout: float) -> torch.Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
    )[0]


OURS = ("packed", "Triton")  # packed_attention on a CPU and on a GPU
BACKENDS = {  # of q, k, v [T, heads, d], boundaries, the longest and dropout
    "memory-efficient": _torch_efficient,
    "torch flash": _torch_flash,
    "flash-attn 2": _flash_attn_2,
    "flash-attn 4": _flash_attn_4,
}
