"""Scores against scikit-learn, scipy and cases by hand."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from fastelectra.tasks.metrics import score, summarize
from fastelectra.tasks.table import TASKS


def outputs_of(classes, count=2):
    return np.eye(count, dtype=np.float32)[classes]


def test_classes_by_hand():
    labels, predicted = [1, 1, 1, 0, 0, 0, 0, 0], outputs_of([1, 1, 0, 1, 0, 0, 0, 0])
    scores = score(TASKS["mrpc"], predicted, labels)
    assert scores == pytest.approx({"accuracy": 6 / 8, "f1": 2 / 3})  # 2 hits, 1 missed, 1 false
    scores = score(TASKS["cola"], predicted, labels)
    assert scores["matthews"] == pytest.approx((2 * 4 - 1 * 1) / np.sqrt(3 * 3 * 5 * 5))
    assert scores["matthews"] == pytest.approx(
        sklearn_metrics.matthews_corrcoef(labels, predicted.argmax(1))
    )
    never = score(TASKS["mrpc"], outputs_of([0] * 8), labels)
    assert never == {"accuracy": 5 / 8, "f1": 0.0}
    three = score(TASKS["mnli"], outputs_of([2, 1, 0, 0], 3), [2, 1, 0, 1])
    assert three == {"accuracy": 0.75}


def test_values_by_hand():
    task, labels = TASKS["sts-b"], [0.0, 0.2, 0.4, 1.0]
    scores = score(task, np.array([[0.1], [0.2], [0.4], [0.3]], np.float32), labels)
    assert scores["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # two ranks off by one
    expected = stats.pearsonr(labels, [0.1, 0.2, 0.4, 0.3]).statistic
    assert scores["pearson"] == pytest.approx(expected, abs=1e-6)
    assert score(task, np.ones((4, 1), np.float32), labels) == {"spearman": 0.0, "pearson": 0.0}


def test_every_metric_of_the_table_is_known():
    labels = [0, 1, 0, 1]
    for task in TASKS.values():
        outputs = outputs_of(labels, len(task.labels)) if task.labels else outputs_of(labels)[:, 1:]
        assert score(task, outputs, labels) == pytest.approx(dict.fromkeys(task.metrics, 1.0))
    task = replace(TASKS["cola"], metrics=("accuracy", "matthews"))
    assert list(score(task, outputs_of(labels), labels)) == ["accuracy", "matthews"]


def test_summary():
    runs = [{"dev": {"f1": value}, "test": {"f1": 0.5}} for value in (0.1, 0.4, 0.2)]
    assert summarize(runs)["median"] == {"dev": {"f1": 0.2}, "test": {"f1": 0.5}}
    assert summarize(runs)["sd"]["dev"]["f1"] == pytest.approx(np.std([0.1, 0.4, 0.2], ddof=1))
    assert (summarize(runs)["min"]["dev"], summarize(runs)["max"]["dev"]) == (
        {"f1": 0.1},
        {"f1": 0.4},
    )
    assert summarize(runs[:1])["sd"]["dev"]["f1"] == 0.0
