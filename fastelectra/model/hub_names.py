"""Parameters of Electra as tensors of Hugging Face's Electra models, and back.

Theirs are ours under other names, except that our `qkv` is their query, key and value, one below
the other, and that the embeddings, which our networks share, are in each of their files.
"""

import re

import torch

_RULES = tuple(  # the first that matches the whole of our name gives theirs
    (re.compile(ours), theirs)
    for ours, theirs in (
        (r"(?:\w+\.)?embeddings\.(word|position)", r"electra.embeddings.\1_embeddings.weight"),
        (r"(?:\w+\.)?embeddings\.segment", r"electra.embeddings.token_type_embeddings.weight"),
        (r"(?:\w+\.)?embeddings\.norm_(\w+)", r"electra.embeddings.LayerNorm.\1"),
        (r"\w+\.project\.(\w+)", r"electra.embeddings_project.\1"),
        (
            r"\w+\.encoder\.(\d+)\.qkv\.(\w+)",
            r"electra.encoder.layer.\1.attention.self.query.\2"
            r" electra.encoder.layer.\1.attention.self.key.\2"
            r" electra.encoder.layer.\1.attention.self.value.\2",
        ),
        (
            r"\w+\.encoder\.(\d+)\.attention_output\.norm_(\w+)",
            r"electra.encoder.layer.\1.attention.output.LayerNorm.\2",
        ),
        (
            r"\w+\.encoder\.(\d+)\.attention_output\.(\w+)",
            r"electra.encoder.layer.\1.attention.output.dense.\2",
        ),
        (
            r"\w+\.encoder\.(\d+)\.output\.norm_(\w+)",
            r"electra.encoder.layer.\1.output.LayerNorm.\2",
        ),
        (r"\w+\.encoder\.(\d+)\.(\w+)\.(\w+)", r"electra.encoder.layer.\1.\2.dense.\3"),
        (r"generator\.head\.output_bias", r"generator_lm_head.bias"),
        (r"generator\.head\.norm_(\w+)", r"generator_predictions.LayerNorm.\1"),
        (r"discriminator\.head\.output_(\w+)", r"discriminator_predictions.dense_prediction.\1"),
        (r"(\w+)\.head\.(\w+)", r"\1_predictions.dense.\2"),
    )
)


def hub_names(name: str) -> list[str]:
    """Their name for our parameter, or names, where it is theirs one below the other."""
    for ours, theirs in _RULES:
        if match := ours.fullmatch(name):
            return match.expand(theirs).split()
    raise KeyError(name)


def to_hub(
    weights: dict[str, torch.Tensor], network: str, predicts: bool | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of the file of one network ("discriminator" or "generator").

    predicts: whether its head is that of ElectraForMaskedLM; default: the generator's is.
    """
    predicts = network == "generator" if predicts is None else predicts
    tensors = {}
    for name, tensor in sorted(weights.items()):  # "generator.embeddings." after "embeddings."
        if name.startswith(("embeddings.", f"{network}.")) and ".copy_" not in name:
            names = hub_names(name.replace("discriminator.", "generator.") if predicts else name)
            parts = (part.contiguous() for part in tensor.chunk(len(names)))
            tensors.update(zip(names, parts, strict=True))
    return tensors


def from_hub(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Our parameter `name` in fp32 from their tensors. Raises KeyError with the missing name."""
    return torch.cat([tensors[part].float() for part in hub_names(name)])
