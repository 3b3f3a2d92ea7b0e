"""The comparison of attentions as it is run, on a few tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "bench/attention.py"


def test_a_run_compares_every_way(tmp_path):
    out = tmp_path / "a" / "result.json"
    command = [sys.executable, FILE, "--presets", "small", "--tokens", "300", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["way"], row["heads"]) for row in rows] == [
        ("packed", 4), ("padded", 4), ("packed", 1), ("padded", 1),
    ]  # fmt: skip
    for row in rows:
        assert row["tokens"] == 256  # whole examples
        assert row["chosen"] == (row["way"] == "packed")
        assert 0 < row["error"] < 0.01
        assert row["tflop_per_s"][0] * row["ms"][0] == pytest.approx(
            4 * 256 * 128 * 64 * row["heads"] / 1e9
        )
