"""A pretrained model of a few thousand weights, and commands run in this process."""

import os
from dataclasses import replace

import pytest
from checkpoints import ODD, fastelectra, write_checkpoint


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture(autouse=True)
def environment():
    """Commands set up a process group of one; the next test begins without."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, corpus):
    """A checkpoint with random weights."""
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    write_checkpoint(path, corpus, replace(ODD, layers=2))
    return path


@pytest.fixture(scope="session")
def exported(checkpoint):
    """Its export."""
    assert fastelectra("export", checkpoint, checkpoint.with_name("export")) == 0
    return checkpoint.with_name("export")
