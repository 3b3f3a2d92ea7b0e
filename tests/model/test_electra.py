"""Sizes and initial state of the two networks."""

from pathlib import Path

import pytest
import torch

from fastelectra.config import load_config
from fastelectra.model import Electra

CONFIGS = Path(__file__).parents[2] / "configs"


def without(electra, network):
    """Parameters of `electra` but for one network's own."""
    named = electra.named_parameters()
    return sum(p.numel() for name, p in named if not name.startswith(f"{network}."))


@pytest.mark.parametrize(
    ("preset", "discriminator", "generator", "both"),
    [
        ("small", 13_549_057, 4_620_026, 14_196_219),
        ("base", 109_483_009, 33_740_602, 119_386_427),
        ("large", 335_142_913, 51_295_290, 354_655_291),
    ],
)
def test_parameter_counts_are_the_papers(preset, discriminator, generator, both):
    config = load_config(CONFIGS / f"{preset}.json")
    with torch.device("meta"):
        electra = Electra(config.model, 30_522, config.objective)
    assert without(electra, "generator") == discriminator
    assert without(electra, "discriminator") == generator
    assert without(electra, "nothing") == both
