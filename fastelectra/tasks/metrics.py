"""GLUE's metrics, by scikit-learn and scipy, and their summary over seeds."""

import statistics
from collections.abc import Sequence

import numpy as np

from fastelectra.tasks.table import Task


def score(task: Task, outputs: np.ndarray, labels: Sequence[float]) -> dict[str, float]:
    """Each of the task's metrics, at most 1, of outputs [N, classes or 1] and labels [N]."""
    from scipy import stats  # a second, both
    from sklearn import metrics

    predicted, labels = decide(task, outputs), np.asarray(labels)
    functions = {
        "accuracy": metrics.accuracy_score,
        "f1": lambda a, b: metrics.f1_score(a, b, zero_division=0.0),
        "matthews": metrics.matthews_corrcoef,
        "spearman": lambda a, b: _correlation(stats.spearmanr, a, b),
        "pearson": lambda a, b: _correlation(stats.pearsonr, a, b),
    }
    return {name: float(functions[name](labels, predicted)) for name in task.metrics}


def _correlation(function, labels: np.ndarray, predicted: np.ndarray) -> float:
    """0 where one of them is constant."""
    if np.ptp(labels) == 0 or np.ptp(predicted) == 0:
        return 0.0
    return function(labels, predicted).statistic


def decide(task: Task, outputs: np.ndarray) -> np.ndarray:
    """[N]: the class of each row, or its value."""
    return outputs.argmax(1) if task.labels else outputs[:, 0]


def summarize(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict]:
    """{"median": {split: {metric: value}}, "sd": …, "min": …, "max": …} over the runs' scores."""
    functions = {
        "median": statistics.median,
        "sd": lambda values: statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min,
        "max": max,
    }
    return {
        kind: {
            split: {name: function([run[split][name] for run in runs]) for name in scores}
            for split, scores in runs[0].items()
        }
        for kind, function in functions.items()
    }
