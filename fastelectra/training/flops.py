"""How much arithmetic a token, a step and a run cost, and how much a GPU can do: `fastelectra
flops`.

Two ways of counting, over the same parts:

- MFU's: matrix products alone, backward = 2 × forward, embeddings looked up for nothing, the
  vocabulary at the masked share of the positions: 70.2, 667.7 and 2169 MFLOP a token for small,
  base and large. Figures that are 1 to 2 % higher count element-wise work too.
- The paper's, as google-research/electra prints it: element-wise operations too, embeddings as
  products with one-hot vectors, backward = forward, the vocabulary at .15625 of the positions.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fastelectra.config import Config, add_config_arguments, generator_sizes, load_config

PAPER_SHARE = 0.15625  # of the positions are predicted, in the paper's count
PAPER_VOCABULARY = 30_522
# Operations on one element, in the paper's count.
DROPOUT, LAYER_NORM, GELU, SOFTMAX = 4, 5, 8, 5

# Dense bf16 TFLOP/s from NVIDIA's data sheets, by words of the device's name; first match counts.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "GH200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10": 125,
    "RTX 4090": 165,
    "RTX A6000": 155,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that this GPU's data sheet promises in 16 bit; None when it is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    if "Laptop" in name:  # slower than the card whose name it has
        return None
    found = (tflops for words, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", name))
    return next((1e12 * tflops for tflops in found), None)


@dataclass(frozen=True)
class Part:
    """Forward FLOPs of one token in one part of the step."""

    name: str
    products: float  # matrix products of activations, 2 a multiplication and addition
    others: float  # element-wise operations, and looking up as products with one-hot vectors


def parts(config: Config, vocab_size: int, share: float) -> list[Part]:
    """The parts of a step, every token in an example of the full length, `share` predicted."""
    model, kind = config.model, config.objective.kind
    embedding, narrow = model.embedding_size, generator_sizes(model)
    wide = (model.hidden_size, model.intermediate_size, model.heads)
    networks = [narrow, wide] if kind.generator else [wide]
    projected = [hidden for hidden, *_ in networks if hidden != embedding]
    rows = vocab_size + config.data.max_length + 2  # of the tables
    lookups = 2 * rows + 2 + LAYER_NORM + DROPOUT
    main, judged = "discriminator" if kind.detects else "main", 1 if kind.everywhere else share
    counted = [
        Part(
            "embeddings and projections",
            sum(2 * embedding * hidden for hidden in projected),
            len(networks) * embedding * lookups + sum(projected),
        )
    ]
    if kind.generator:
        counted.append(_layers("generator layers", config, *narrow))
        counted.append(_token_head("generator", config, narrow[0], vocab_size, share))
    counted.append(_layers(f"{main} layers", config, *wide))
    if kind.detects:
        products, others = 2 * wide[0] * (wide[0] + 1), wide[0] * (1 + GELU)
        counted.append(Part("discriminator head", judged * products, judged * others))
    else:
        counted.append(_token_head(main, config, wide[0], vocab_size, judged, kind.everywhere))
    return counted


def _token_head(
    network: str, config: Config, hidden: int, vocab_size: int, share: float, copies: bool = False
) -> Part:
    embedding = config.model.embedding_size
    products = 2 * embedding * (hidden + vocab_size) + copies * 2 * hidden
    others = embedding * (1 + GELU + LAYER_NORM) + vocab_size * (SOFTMAX + 2)
    return Part(f"{network} head and vocabulary", share * products, share * others)


def _layers(name: str, config: Config, hidden: int, intermediate: int, heads: int) -> Part:
    length, layers = config.data.max_length, config.model.layers
    products = 8 * hidden**2 + 4 * hidden * intermediate + 4 * length * hidden
    others = (
        3 * hidden  # biases of queries, keys and values
        + length * heads * (1 + SOFTMAX + DROPOUT)
        + 2 * hidden * (1 + DROPOUT + 1)  # bias, dropout and residual, twice
        + (hidden + 1) * LAYER_NORM  # the script counts the first one as one element
        + intermediate * (1 + GELU)
    )
    return Part(name, layers * products, layers * others)


def flops_per_token(config: Config, vocab_size: int) -> float:
    """FLOPs of one training token as MFU counts them."""
    return 3 * sum(part.products for part in parts(config, vocab_size, config.data.mask_fraction))


def paper_flops_per_token(config: Config, vocab_size: int) -> float:
    """FLOPs of one training token as the paper counts them."""
    return 2 * sum(part.products + part.others for part in parts(config, vocab_size, PAPER_SHARE))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `fastelectra flops`."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print FLOPs by part, and of a token, a step and the run. Raises FastElectraError."""
    config = load_config(args.config, args.set)
    from fastelectra.data.shards import open_corpus  # counting alone needs no tokenizers

    vocab_size, source = PAPER_VOCABULARY, "the paper's: the corpus is not prepared"
    if config.data.path and (Path(config.data.path) / "manifest.json").is_file():
        vocab_size, source = open_corpus(config.data.path).vocab_size, config.data.path
    print(f"{args.config}: examples of {config.data.max_length}, vocabulary {vocab_size:,}"
          f" ({source})\n")  # fmt: skip
    print("\n".join(table(config, vocab_size)))
    return 0


def table(config: Config, vocab_size: int) -> list[str]:
    """Lines: MFLOP a token by part, then a token, a step and the run, in both ways of counting."""
    mfu = [3 * p.products / 1e6 for p in parts(config, vocab_size, config.data.mask_fraction)]
    counted = parts(config, vocab_size, PAPER_SHARE)
    paper = [2 * (part.products + part.others) / 1e6 for part in counted]
    lines = [f"{'MFLOP a token':32s}{'MFU’s count':>18s}{'the paper’s':>18s}"]
    lines += [
        f"{part.name:32s}{m:11.2f}{m / sum(mfu):7.1%}{p:11.2f}{p / sum(paper):7.1%}"
        for part, m, p in zip(counted, mfu, paper, strict=True)
    ]
    lines.append(f"{'total':32s}{sum(mfu):11.2f}{'':7s}{sum(paper):11.2f}")
    step = config.training.batch_tokens
    for name, tokens in (("step", step), ("run", step * config.training.steps)):
        label = f"FLOP a {name} of {tokens:,} tokens"
        lines.append(f"{label:40s}{sum(mfu) * 1e6 * tokens:10.4g}{sum(paper) * 1e6 * tokens:18.4g}")
    lines.append("MFU’s: matrix products, backward = 2 × forward, embeddings looked up")
    lines.append("the paper’s: every operation, backward = forward, embeddings as products")
    return lines
