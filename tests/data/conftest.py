"""A small corpus of real sentences, in one shard and in several."""

import pytest
from texts import make_text, prepare

from fastelectra.data.shards import Corpus, open_corpus


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(300), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(text_file, tmp_path_factory) -> Corpus:
    """One train and one held-out shard."""
    out = tmp_path_factory.mktemp("corpus") / "corpus"
    assert prepare(text_file, "--out", out, "--vocab-size", 500, "--heldout-fraction", 0.1) == 0
    return open_corpus(out)


@pytest.fixture(scope="session")
def sharded_corpus(text_file, tmp_path_factory) -> Corpus:
    """Several train shards, by making a shard small."""
    out = tmp_path_factory.mktemp("sharded") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastelectra.data.prepare.SHARD_BYTES", 50_000)
        assert prepare(text_file, "--out", out, "--vocab-size", 500, "--heldout-fraction", 0.2) == 0
    return open_corpus(out)
