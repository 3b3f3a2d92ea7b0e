"""Schedule, optimizer and scores against their formulas."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from fastelectra.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from fastelectra.model.electra import Electra
from fastelectra.training.metrics import Skips, area_under_curve, complaints, entropy, scores
from fastelectra.training.optimizer import PaperAdam, parameter_groups
from fastelectra.training.report import sparkline
from fastelectra.training.schedule import learning_rate


def test_learning_rate_at_the_steps_that_matter():
    def rate(step):
        return learning_rate(step, peak=5e-4, warmup_steps=10_000, total_steps=1_000_000)

    assert rate(0) == 0
    assert rate(1) == pytest.approx(5e-8 * (1 - 1e-6), rel=1e-12)
    assert rate(10_000) == pytest.approx(5e-4 * 0.99, rel=1e-12)
    assert rate(500_000) == pytest.approx(2.5e-4, rel=1e-12)
    assert rate(999_999) == pytest.approx(5e-10, rel=1e-9)
    assert rate(1_000_000) == 0
    assert learning_rate(0, 1.0, warmup_steps=0, total_steps=10) == 1.0


@pytest.mark.parametrize("bias_correction", [False, True])
def test_adam_is_the_formula(bias_correction):
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.randn(5))
    module = torch.nn.Module()
    module.register_parameter("matrix", matrix)
    module.register_parameter("vector", vector)
    optimizer = PaperAdam(
        parameter_groups(module, 0.01), OptimizerConfig(bias_correction=bias_correction)
    )
    expected = {p: (p.detach().double().numpy(), 0.0, 0.0) for p in (matrix, vector)}
    for step in range(1, 13):
        lr = 0.01 / step
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p in (matrix, vector):
            p.grad = torch.randn_like(p) * 10 ** torch.randint(-4, 2, ()).item()
            w, m, v = expected[p]
            g = p.grad.double().numpy()
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            corrected = (m / (1 - 0.9**step), v / (1 - 0.999**step)) if bias_correction else (m, v)
            update = corrected[0] / (np.sqrt(corrected[1]) + 1e-6)
            decay = 0.01 if p is matrix else 0.0
            expected[p] = (w - lr * (update + decay * w), m, v)
        optimizer.step()
    for p, (w, _, _) in expected.items():
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=2e-6, atol=2e-7)


def test_decay_groups_hold_every_parameter_once():
    sizes = ModelConfig(layers=2, hidden_size=32, intermediate_size=48, heads=2, embedding_size=16)
    model = Electra(sizes, 100, ObjectiveConfig())
    decayed, free = parameter_groups(model, 0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [names[id(p)] for p in [*decayed["params"], *free["params"]]]
    assert sorted(listed) == sorted(names.values())
    assert len(listed) == len(set(listed))
    assert {"embeddings.word", "embeddings.position", "embeddings.segment"} <= set(
        listed[: len(decayed["params"])]
    )
    for parameter in free["params"]:
        name = names[id(parameter)]
        assert name.endswith("bias") or "norm" in name, name
    assert not any("bias" in names[id(p)] or "norm" in names[id(p)] for p in decayed["params"])
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)


def test_scores_from_counts_and_histogram():
    rng = np.random.default_rng(0)
    labels = rng.random(5000) < 0.1
    bins = np.clip(rng.normal(500 + 20 * labels, 30).astype(int), 0, 1023)
    histogram = torch.zeros(2, 1024, dtype=torch.float64)
    np.add.at(histogram.numpy(), (labels.astype(int), bins), 1)
    counts = {"mlm_loss": 3200.0, "mlm_correct": 300.0, "masked": 750.0,
              "replaced": float(labels.sum()), "disc_loss": 1500.0, "tokens": 5000.0,
              "predicted": 5000.0}  # fmt: skip
    result = scores(counts, histogram)
    assert result["auc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, bins), rel=1e-12)
    flagged = bins >= 512
    assert result["precision"] == sklearn_metrics.precision_score(labels, flagged)
    assert result["recall"] == sklearn_metrics.recall_score(labels, flagged)
    assert result["mlm_loss"] == pytest.approx(3200 / 750)
    assert result["mlm_accuracy"] == pytest.approx(0.4)
    assert result["sampled_accuracy"] == pytest.approx(1 - labels.sum() / 750)
    assert result["fake_rate"] == pytest.approx(labels.mean())
    assert result["disc_loss"] == pytest.approx(0.3)
    assert result["gain"] == pytest.approx(1 - 0.3 / entropy(labels.mean()))
    nothing = scores(dict.fromkeys(counts, 0.0), torch.zeros(2, 1024))
    assert all(math.isnan(nothing[name]) for name in ("mlm_loss", "auc", "precision", "gain"))


def test_a_constant_guess_has_collapsed_and_half_the_area():
    assert [round(entropy(rate), 3) for rate in (0.15, 0.09, 0.07)] == [0.423, 0.303, 0.254]
    assert entropy(0.0) == entropy(1.0) == 0.0
    same = torch.zeros(2, 1024)
    same[0, 300], same[1, 300] = 900, 100
    assert area_under_curve(same) == 0.5
    well = {"gain": 0.021, "disc_loss": 0.2, "prior_loss": 0.21, "mlm_loss": 6.2}
    assert complaints(well, 1000) == {}
    for gain in (-0.1, 0.019):
        found = complaints({**well, "gain": gain}, 1000)
        assert list(found) == ["discriminator"]
        assert "loss 0.2000 is no better than H(fake rate) = 0.2100" in found["discriminator"]
    found = complaints({**well, "mlm_loss": 6.3}, 1000)
    assert list(found) == ["generator"]
    assert (
        "6.300 is hardly better than that of a uniform guess, ln(vocabulary) = 6.908"
        in (found["generator"])
    )


def test_skipped_updates_are_counted():
    skips = Skips()
    for norm in (1.0, math.inf, torch.tensor(math.nan), 0.0, torch.tensor(-math.inf)):
        skips.add(norm)
    skips.read()
    assert (skips.total, skips.in_row, skips.longest) == (3, 1, 2)
    skips.add(torch.tensor(2.0))
    skips.read()
    assert (skips.total, skips.in_row, skips.longest) == (3, 0, 2)


def test_sparklines_go_from_low_to_high():
    assert sparkline([0.5, None, 0.6, 0.7]) == "0.500 ▁▅█ 0.700"
    assert sparkline([1.0, 1.0]) == "1.000 ▄▄ 1.000"
    assert sparkline([None]) == "–"
