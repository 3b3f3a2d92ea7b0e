"""What bench/kernels.py measures: every fused op at the sizes of a preset's training step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fastelectra.kernels.linear_cross_entropy_sample import FLASH_WIDTH
from options import ROOT

from fastelectra import kernels
from fastelectra.config import generator_sizes, load_config
from fastelectra.data.batch import BatchShape

VOCABULARY, MASK = 30_522, 103


@dataclass
class Case:
    """An op at one size: how to run it, and the least it must move and compute."""

    op: str
    size: str
    make: Callable[[], tuple]  # its inputs
    bytes: tuple[float, float]  # moved by forward and by backward
    flop: tuple[float, float] = (0, 0)
    plain: Callable | None = None  # in PyTorch; default: the op's reference
    together: bool = False  # forward does work of backward: all is counted as forward's

    def call(self, inputs: tuple, reference: bool = False) -> list[torch.Tensor]:
        """The op's outputs that have a gradient, or the first."""
        function = getattr(kernels, self.op)
        if reference:
            function = self.plain or getattr(kernels, f"{self.op}_reference")
        output = function(*inputs)
        outputs = output if isinstance(output, tuple) else (output,)
        return [output for output in outputs if output.requires_grad] or [outputs[0]]


def cases(preset: str, device: str, dtype: torch.dtype, most_head_rows: int = 2**31) -> list[Case]:
    """The ops of a training step of a preset, the vocabulary head on not more than so many rows."""
    config = load_config(ROOT / "configs" / f"{preset}.json")
    model, tokens = config.model, config.training.micro_batch_tokens
    shape = BatchShape.of(tokens, config.data.max_length, config.data.mask_fraction)
    narrow, narrow_ffn, few = generator_sizes(model)
    maker = Maker(device, dtype, tokens, shape.masked)
    heads = [
        Maker(device, dtype, tokens, min(rows, most_head_rows))
        for rows in (shape.masked, 4 * shape.masked)  # of one batch, and of a four times larger
    ]
    found = [
        maker.embed_layer_norm(model.embedding_size, model.max_positions, model.dropout),
        maker.masked_gather(narrow),
        maker.bias_gelu_layer_norm(model.embedding_size),
        heads[0].linear_cross_entropy_sample(model.embedding_size),
        heads[1].linear_cross_entropy_sample(model.embedding_size),
        maker.replace_tokens(),
        maker.replaced_token_loss(model.hidden_size),
    ]
    networks = (
        (narrow, narrow_ffn, few),
        (model.hidden_size, model.intermediate_size, model.heads),
    )
    for hidden, ffn, attention_heads in networks:
        found += [
            maker.split_qkv(hidden),
            maker.packed_attention(
                hidden, attention_heads, config.data.max_length, model.attention_dropout
            ),
            maker.dropout_add_layer_norm(hidden, model.dropout),
            maker.bias_gelu(ffn),
        ]
    return found


class Maker:
    """Cases on T tokens of which M are chosen."""

    def __init__(self, device: str, dtype: torch.dtype, tokens: int, masked: int):
        self.device, self.dtype, self.tokens, self.masked = device, dtype, tokens, masked
        self.item = dtype.itemsize
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_()

    def _integers(self, high: int, size: int) -> torch.Tensor:
        return torch.randint(high, (size,), device=self.device, dtype=torch.int32)

    def _words(self) -> torch.Tensor:
        """Tokens as the generator sees them: 15 % [MASK], the others by Zipf's law."""
        u, masked = torch.rand(2, self.tokens, device=self.device)
        return torch.where(masked < 0.15, MASK, VOCABULARY**u).int()

    def _positions(self) -> torch.Tensor:
        return torch.linspace(0, self.tokens - 1, self.masked, device=self.device).int()

    def _case(self, op: str, rows: int, width: int, make, moved: tuple[float, float]) -> Case:
        """A case that moves so many [rows, width] matrices."""
        matrix = rows * width * self.item
        return Case(op, f"[{rows}, {width}]", make, (moved[0] * matrix, moved[1] * matrix))

    def bias_gelu(self, width):
        def make():
            return self._random(self.tokens, width), self._random(width)

        return self._case("bias_gelu", self.tokens, width, make, (2, 3))

    def bias_gelu_layer_norm(self, width):
        def make():
            return self._random(self.masked, width), *(self._random(width) for _ in range(3))

        return self._case("bias_gelu_layer_norm", self.masked, width, make, (2, 3))

    def dropout_add_layer_norm(self, width, p):
        def make():
            x, residual = (self._random(self.tokens, width) for _ in range(2))
            bias, *norm = (self._random(width) for _ in range(3))
            return x, bias, residual, *norm, p, self.seed

        return self._case("dropout_add_layer_norm", self.tokens, width, make, (3, 6))

    def embed_layer_norm(self, width, positions, p):
        def make():
            tables = [self._random(size, width) for size in (VOCABULARY, 2, positions)]
            index = (self._integers(size, self.tokens) for size in (2, positions))
            norm = self._random(width), self._random(width)
            return self._words(), *index, *tables, *norm, p, self.seed

        case = self._case("embed_layer_norm", self.tokens, width, make, (2, 5))
        table = (VOCABULARY + positions) * width * self.item  # its gradient is written whole
        return Case(case.op, case.size, make, (case.bytes[0], case.bytes[1] + table))

    def masked_gather(self, width):
        def make():
            return self._random(self.tokens, width), self._positions()

        share = self.masked / self.tokens
        return self._case("masked_gather", self.tokens, width, make, (2 * share, 1 + share))

    def split_qkv(self, width):
        def make():
            return self._random(self.tokens, 3, 1, width), self._random(3 * width)

        return self._case("split_qkv", self.tokens, width, make, (0, 6))

    def packed_attention(self, width, heads, length, p):
        def make():
            qkv = self._random(self.tokens, 3, heads, width // heads)
            boundaries = torch.arange(0, self.tokens + 1, length, device=self.device).int()
            return qkv, self._random(3 * width), boundaries, length, p, self.seed

        case = self._case("packed_attention", self.tokens, width, make, (4, 8))
        case.flop = 4.0 * self.tokens * length * width, 10.0 * self.tokens * length * width
        case.plain = attention_of_one_length
        return case

    def replace_tokens(self):
        def make():
            return (self._integers(VOCABULARY, self.tokens), self._positions(),
                    self._integers(VOCABULARY, self.masked))  # fmt: skip

        return Case("replace_tokens", f"[{self.tokens}]", make,
                    (12 * self.tokens + 8 * self.masked, 0))  # fmt: skip

    def replaced_token_loss(self, width):
        def make():
            vectors = self._random(width), self._random(width), self._random(1)
            real = torch.tensor(self.tokens, dtype=torch.int32, device=self.device)
            return self._random(self.tokens, width), *vectors, self._integers(2, self.tokens), real

        return self._case("replaced_token_loss", self.tokens, width, make, (1, 2))

    def linear_cross_entropy_sample(self, width):
        def make():
            rows = self._random(self.masked, width), self._random(VOCABULARY, width)
            labels = self._integers(VOCABULARY, self.masked)
            uniforms = torch.rand(self.masked, device=self.device)
            return *rows, self._random(VOCABULARY), labels, uniforms

        product = 2.0 * self.masked * width * VOCABULARY
        table = (self.masked + VOCABULARY) * width * self.item
        case = Case("linear_cross_entropy_sample", f"[{self.masked}, {width}]", make,
                    (table, 2 * table), (product, 2 * product))  # fmt: skip
        if width > FLASH_WIDTH:  # in chunks, whose forward makes the gradients' products too
            case.bytes, case.flop, case.together = (3 * table, 0), (3 * product, 0), True
        return case


def attention_of_one_length(qkv, bias, boundaries, longest, p, seed):
    """packed_attention in PyTorch without asking for the lengths, where all are `longest`."""
    return padded(*kernels.split_qkv_reference(qkv, bias), boundaries, longest, p)


def padded(q, k, v, boundaries, longest: int, dropout: float) -> torch.Tensor:
    """PyTorch's attention on examples as rows of one length, which they have here."""
    rows = (part.unflatten(0, (-1, longest)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(*rows, dropout_p=dropout).transpose(1, 2).flatten(0, 1)
