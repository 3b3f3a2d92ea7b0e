"""What several rooms' tests share: a small real corpus, prepared once."""

from pathlib import Path

import pytest

from fastelectra import cli

TEXT = Path(__file__).parent / "texts" / "washington.txt"  # his messages to Congress, 1790 to 1796


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A prepared corpus: real English, 1 000 WordPieces, a third of the documents held out."""
    out = tmp_path_factory.mktemp("data") / "corpus"
    arguments = ["prepare", str(TEXT), "--out", str(out), "--vocab-size", "1000"]
    assert cli.main([*arguments, "--heldout-fraction", "0.3", "--workers", "1"]) == 0
    return out
