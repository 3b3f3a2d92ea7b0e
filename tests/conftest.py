"""What several rooms' tests share: a small real corpus, prepared once."""

from pathlib import Path

import pytest
import torch

from fastelectra import cli

TEXT = Path(__file__).parent / "texts" / "washington.txt"  # his messages to Congress, 1790 to 1796


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A prepared corpus: real English, 1 000 WordPieces, a third of the documents held out."""
    out = tmp_path_factory.mktemp("data") / "corpus"
    arguments = ["prepare", str(TEXT), "--out", str(out), "--vocab-size", "1000"]
    assert cli.main([*arguments, "--heldout-fraction", "0.3", "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def one_thread():
    """Threads that wait for each other cost more than such small tensors gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def exported(tmp_path, corpus):
    """A checkpoint's export."""
    from checkpoints import fastelectra, write_checkpoint  # not installed for kernels alone

    write_checkpoint(tmp_path / "checkpoint", corpus)
    assert fastelectra("export", tmp_path / "checkpoint", tmp_path / "exported") == 0
    return tmp_path / "exported"
