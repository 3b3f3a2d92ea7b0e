"""Fused operations of the ELECTRA step, imported as fastelectra.kernels.

Floating-point tensors are bf16, fp16 or fp32 with fp32 statistics and accumulation (fp64 stays
fp64 throughout); integer tensors are int32, seeds int64. CUDA tensors take the Triton kernels, CPU
tensors compiled loops where an op has them, else plain PyTorch: `dispatch` decides.
"""

from .bias_gelu import bias_gelu, bias_gelu_reference
from .bias_gelu_layer_norm import bias_gelu_layer_norm, bias_gelu_layer_norm_reference
from .dispatch import describe, set_backend
from .dropout_add_layer_norm import dropout_add_layer_norm, dropout_add_layer_norm_reference
from .embed_layer_norm import embed_layer_norm, embed_layer_norm_reference
from .linear import linear
from .linear_cross_entropy_sample import (
    linear_cross_entropy_sample,
    linear_cross_entropy_sample_reference,
)
from .masked_gather import masked_gather, masked_gather_reference
from .packed_attention import packed_attention, packed_attention_reference
from .replace_tokens import replace_tokens, replace_tokens_reference
from .replaced_token_loss import replaced_token_loss, replaced_token_loss_reference
from .split_qkv import split_qkv, split_qkv_reference

__all__ = [
    "bias_gelu",
    "bias_gelu_layer_norm",
    "bias_gelu_layer_norm_reference",
    "bias_gelu_reference",
    "describe",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_reference",
    "embed_layer_norm",
    "embed_layer_norm_reference",
    "linear",
    "linear_cross_entropy_sample",
    "linear_cross_entropy_sample_reference",
    "masked_gather",
    "masked_gather_reference",
    "packed_attention",
    "packed_attention_reference",
    "replace_tokens",
    "replace_tokens_reference",
    "replaced_token_loss",
    "replaced_token_loss_reference",
    "set_backend",
    "split_qkv",
    "split_qkv_reference",
]
