"""FLOPs in both ways of counting: the paper's (Clark et al. 2020) against its authors' script, and
MFU's, of matrix products alone, against counts of a token's whole work."""

from pathlib import Path

import pytest
import torch

from fastelectra import cli
from fastelectra.config import OBJECTIVES, load_config
from fastelectra.training.flops import (
    PAPER_VOCABULARY,
    flops_per_token,
    paper_flops_per_token,
    peak_flops,
)
from fastelectra.training.flops import parts as parts_of

CONFIGS = Path(__file__).parents[2] / "configs"


def preset(name):
    return load_config(CONFIGS / f"{name}.json")


@pytest.mark.parametrize(
    ("name", "run"), [("small", 1.293743798272e18), ("base", 6.424541834277683e19)]
)
def test_the_paper_s_count_is_google_s_script_s(name, run):
    config = preset(name)
    tokens = config.training.steps * config.training.batch_tokens
    assert paper_flops_per_token(config, PAPER_VOCABULARY) * tokens == pytest.approx(run, 1e-3)


def test_the_paper_s_bert_small_takes_its_1450000_steps():
    config = preset("small")
    config.objective.name = "mlm"
    count = paper_flops_per_token(config, PAPER_VOCABULARY)
    assert count * 1.45e6 * config.training.batch_tokens == pytest.approx(1.41874e18, 1e-3)


def test_objectives_differ_by_what_they_do():
    config = preset("small")
    counts = {}
    for name in OBJECTIVES:
        config.objective.name = name
        parts = parts_of(config, PAPER_VOCABULARY, 0.15)
        counts[name] = sum(part.products for part in parts)
        assert 3 * counts[name] == flops_per_token(config, PAPER_VOCABULARY)
    judging = 2 * 256 * 257
    predicting = 2 * 128 * (256 + PAPER_VOCABULARY)
    generating = 0.15 * 2 * 128 * (64 + PAPER_VOCABULARY) + 2 * 64 * 128
    layers = 12 * 2 * (64 * 64 * 4 + 2 * 64 * 256 + 2 * 128 * 64)
    assert counts["electra_15"] == pytest.approx(counts["electra"] - 0.85 * judging)
    without = counts["electra"] - judging
    assert counts["replace_mlm"] == pytest.approx(without + 0.15 * predicting)
    assert counts["all_tokens_mlm"] == pytest.approx(without + predicting + 2 * 256)
    assert counts["mlm"] == pytest.approx(counts["replace_mlm"] - generating - layers)


@pytest.mark.parametrize(
    ("name", "mega", "share"),
    [("small", 71.4, 0.98), ("base", 677.6, 0.985), ("large", 2188, 0.99)],
)
def test_mfu_s_count_is_the_whole_work_less_what_is_element_wise(name, mega, share):
    """`mega`: MFLOP a token, element-wise operations counted too."""
    config = preset(name)
    assert share < flops_per_token(config, PAPER_VOCABULARY) / 1e6 / mega < 1
    parts = parts_of(config, PAPER_VOCABULARY, config.data.mask_fraction)
    one_hot = 2 * 2 * config.model.embedding_size * PAPER_VOCABULARY
    everything = 3 * (sum(part.products + part.others for part in parts) - one_hot)
    assert everything / 1e6 == pytest.approx(mega, 1e-3)


def test_products_are_those_of_the_parameters_and_attention():
    config = preset("small")
    products = {part.name: part.products for part in parts_of(config, PAPER_VOCABULARY, 1.0)}
    layer = 256 * 256 * 4 + 2 * 256 * 1024
    assert products["discriminator layers"] == 12 * 2 * (layer + 2 * 128 * 256)
    assert products["generator head and vocabulary"] == 2 * (64 * 128 + 128 * PAPER_VOCABULARY)
    assert products["embeddings and projections"] == 2 * 128 * (256 + 64)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GB200", None),
        ("Tesla T4", None),
    ],
)
def test_a_data_sheet_is_of_the_whole_name(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = torch.device("cuda")
    assert peak_flops(gpu, "bf16") == (tflops and pytest.approx(1e12 * tflops))
    assert peak_flops(gpu, "fp32") is None


def test_command_prints_parts_and_run(capsys):
    file = str(CONFIGS / "small.json")
    assert cli.main(["flops", "--config", file, "--set", "training.steps=2000000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("total") and "70.22" in line for line in lines)
    assert any(line.startswith("FLOP a run") and "2.587e+18" in line for line in lines)
    assert cli.main(["flops", "--config", file, "--set", "objective.name=mlm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("main head and vocabulary") for line in lines)
    assert not any("generator" in line or "discriminator" in line for line in lines)
