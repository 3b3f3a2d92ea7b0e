"""`fastelectra explain`: the picture in every explanation of ELECTRA, for a sentence of yours.

Tokens are masked, the generator fills them in, the discriminator judges every token. With a
discriminator alone the sentence is judged as it stands.
"""

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import dataclass

import torch

from fastelectra.data.batch import Batch, masked_count
from fastelectra.errors import FastElectraError
from fastelectra.hub import Pretrained, load_pretrained

THRESHOLD = 0.5  # a token above this probability is called replaced


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `fastelectra explain`."""
    parser.add_argument("text", help="a sentence, with [MASK] for a word to be filled in")
    parser.add_argument(
        "--model", required=True, type=os.path.expanduser,  # shells leave the ~ in --model=~/x
        help="export folder, run folder, checkpoint, or a Hugging Face ElectraForPreTraining",
    )  # fmt: skip
    parser.add_argument(
        "--generator", type=os.path.expanduser,
        help="Hugging Face ElectraForMaskedLM, if not in --model",
    )  # fmt: skip
    parser.add_argument(
        "--mask",
        help="token numbers to mask, such as 1,3 ([CLS] is 0), besides any [MASK] in the text;"
        " default: drawn with --seed if there is none",
    )
    parser.add_argument(
        "--top", type=_positive, default=3, help="generator choices shown (default 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the mask and the samples")


def run(args: Namespace) -> int:
    """Explain one sentence on standard output."""
    pretrained = load_pretrained(args.model, args.generator)
    print(render(explain(pretrained, args.text, args.mask, args.top, args.seed), _colours()))
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"expected a number above 0, got {text}")
    return int(text)


@dataclass
class Explained:
    """One token of the sentence: what was asked, drawn and judged there."""

    token: str  # of the sentence
    choices: list[tuple[str, float]] | None  # the generator's, best first; None: not masked
    sampled: str | None  # what the generator drew
    probability: float  # of being replaced, by the discriminator
    replaced: bool | None  # the draw differs from the token; None: the sentence has [MASK] there

    @property
    def shown(self) -> str:
        """The token that the discriminator saw."""
        return self.token if self.sampled is None else self.sampled


@torch.no_grad()
def explain(
    pretrained: Pretrained, text: str, mask: str | None = None, top: int = 3, seed: int = 0
) -> list[Explained]:
    """Mask, generate, replace and judge one sentence.

    Without `mask` or [MASK] in the text, and with a generator, as many tokens as in training (at
    least two where there are so many) are drawn. Raises FastElectraError for an empty or overlong
    text or a bad `mask`.
    """
    electra, tokenizer = pretrained.electra.eval(), pretrained.tokenizer
    if not electra.objective.kind.detects:
        raise FastElectraError(
            f"nothing to explain: the main network of {electra.objective.name} predicts tokens and"
            ' judges none. Export it for pipeline("fill-mask")'
        )
    ids = _encode(pretrained, text)
    generator = torch.Generator().manual_seed(seed % 2**63)
    positions = _positions(pretrained, mask, ids, generator)
    choices, sampled = {}, list(ids)
    if positions:
        probabilities = electra.generator_logits(_batch(pretrained, ids, positions)).softmax(-1)
        draws = torch.multinomial(probabilities, 1, generator=generator)[:, 0].tolist()
        values, indices = probabilities.topk(min(top, probabilities.shape[1]))
        for place, row, best, draw in zip(
            positions, values.tolist(), indices.tolist(), draws, strict=True
        ):
            names = [tokenizer.id_to_token(index) for index in best]
            choices[place] = list(zip(names, row, strict=True))
            sampled[place] = draw
    judged = electra.discriminator_logits(_batch(pretrained, sampled, [])).sigmoid().tolist()
    return [
        Explained(
            token=tokenizer.id_to_token(original),
            choices=choices.get(place),
            sampled=tokenizer.id_to_token(sampled[place]) if place in choices else None,
            probability=judged[place],
            replaced=None if original == pretrained.special["mask"] else sampled[place] != original,
        )
        for place, original in enumerate(ids)
    ]


def _encode(pretrained: Pretrained, text: str) -> list[int]:
    special = pretrained.special
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line that are none
        raise FastElectraError("the text is not UTF-8") from None
    ids = pretrained.tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise FastElectraError("the text has no tokens: give a sentence to explain")
    limit = len(pretrained.electra.embeddings.position) - 2
    if len(ids) > limit:
        raise FastElectraError(f"the text has {len(ids)} tokens, the model takes {limit}")
    return [special["cls"], *ids, special["sep"]]


def _positions(
    pretrained: Pretrained, mask: str | None, ids: list[int], generator: torch.Generator
) -> list[int]:
    """Positions to mask, ascending: those asked for, or drawn uniformly without replacement."""
    length = len(ids)
    written = [place for place, token in enumerate(ids) if token == pretrained.special["mask"]]
    if not pretrained.has_generator:
        if mask is not None or written:
            raise FastElectraError("[MASK] needs a generator to fill it: name one with --generator")
        return []
    if mask is None and written:
        return written
    if mask is None:
        count = min(length - 2, max(2, masked_count(length, 0.15)))
        return sorted((torch.randperm(length - 2, generator=generator)[:count] + 1).tolist())
    try:
        positions = sorted({*written, *(int(number) for number in mask.split(","))})
    except ValueError:
        raise FastElectraError(f"--mask {mask}: expected numbers such as 1,3") from None
    if positions[0] < 1 or positions[-1] > length - 2:
        raise FastElectraError(f"--mask {mask}: the tokens are numbered 1 to {length - 2}")
    return positions


def _batch(pretrained: Pretrained, ids: list[int], masked: list[int]) -> Batch:
    """One unpadded example with [MASK] at `masked`."""

    def ints(values) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32)

    count = len(masked)
    return Batch(
        tokens=ints(ids),
        segments=torch.zeros(len(ids), dtype=torch.int32),
        positions=ints(range(len(ids))),
        cu_seqlens=ints([0, len(ids)]),
        masked_positions=ints(masked),
        masked_inputs=ints([pretrained.special["mask"]] * count),
        labels=ints(ids[place] for place in masked),
        uniforms=torch.zeros(count),
        totals=torch.tensor([float(count), float(len(ids))]),
        max_length=len(ids),
        seed=0,
    )


def _colours() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def render(tokens: list[Explained], colours: bool) -> str:
    """The table of tokens, and the sentence as the discriminator saw it with its verdicts."""
    generated = any(token.choices for token in tokens)
    rows = [["#", "token", "generator's choices", "drawn", "P(replaced)", "verdict"]]
    for number, token in enumerate(tokens):
        choices = ", ".join(f"{name} {share:.0%}" for name, share in token.choices or ())
        rows.append(
            [str(number), token.token, choices, token.sampled or "",
             f"{token.probability:.3f}", _verdict(token, generated)]
        )  # fmt: skip
    if not generated:
        rows = [[row[0], row[1], row[4], row[5]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if colours:
        lines[1:] = [_paint(line, token) for line, token in zip(lines[1:], tokens, strict=True)]
    seen = " ".join(_paint(token.shown, token) if colours else token.shown for token in tokens)
    if generated:
        masked = " ".join("[MASK]" if token.choices else token.token for token in tokens)
        lines += ["", f"generator saw      {masked}", f"discriminator saw  {seen}"]
    else:
        lines += ["", f"discriminator saw  {seen}"]
    return "\n".join(lines)


def _verdict(token: Explained, generated: bool) -> str:
    said = "replaced" if token.probability > THRESHOLD else "original"
    if not generated or token.replaced is None:
        return said
    right = (said == "replaced") == token.replaced
    return said if right else f"{said} (wrong)"


def _paint(text: str, token: Explained) -> str:
    """Green for original through yellow to red for replaced; bold where it was replaced."""
    ramp = (34, 70, 106, 142, 178, 172, 166, 160, 196)  # of the 256-colour palette
    colour = ramp[min(len(ramp) - 1, int(token.probability * len(ramp)))]
    return f"\x1b[{'1;' if token.replaced else ''}38;5;{colour}m{text}\x1b[0m"
