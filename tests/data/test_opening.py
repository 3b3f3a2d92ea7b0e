"""Opening a corpus: one that is damaged, or of another tokenizer, does not train."""

import json
import shutil

import pytest
from texts import make_text, prepare

from fastelectra.data import shards
from fastelectra.data.shards import open_corpus
from fastelectra.errors import FastElectraError

SMALL = ("--vocab-size", 300)


@pytest.fixture
def out(tmp_path):
    (tmp_path / "a.txt").write_text(make_text(10), encoding="utf-8")
    assert prepare(tmp_path / "a.txt", "--out", tmp_path / "out", *SMALL) == 0
    return tmp_path / "out"


def test_a_missing_corpus_names_the_command(tmp_path):
    with pytest.raises(FastElectraError, match=r"`fastelectra prepare INPUT… --out .*/no`"):
        open_corpus(tmp_path / "no")
    with pytest.raises(FastElectraError, match=r"data\.path is not set"):
        open_corpus("")


def test_a_missing_tokenizer(out):
    (out / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(FastElectraError, match=r"tokenizer\.json is missing: delete"):
        open_corpus(out)


def test_missing_and_cut_off_files(out):
    tokens = out / "train-00000.tokens"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-1])
    with pytest.raises(FastElectraError, match=f"{len(content) - 1} bytes instead of"):
        open_corpus(out)
    tokens.unlink()
    with pytest.raises(FastElectraError, match=r"train-00000\.tokens is missing"):
        open_corpus(out)


def test_a_changed_byte_is_found_by_verify(out, monkeypatch):
    monkeypatch.setattr(shards, "SAMPLE_BYTES", 16)  # so that it lies between the samples
    tokens = out / "train-00000.tokens"
    content = bytearray(tokens.read_bytes())
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"][0]["sample_sha256"]["tokens"] = shards.sample_sha256(tokens)
    content[17] ^= 1
    tokens.write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(shards.Corpus, "check", lambda self: None)
        with pytest.raises(FastElectraError, match=r"train-00000\.tokens is damaged"):
            open_corpus(out).verify()


def test_swapped_shards(sharded_corpus, tmp_path):
    out = shutil.copytree(sharded_corpus.path, tmp_path / "swapped")
    first, second = sorted(out.glob("train-*.tokens"), key=lambda file: file.stat().st_size)[:2]
    size, other = first.stat().st_size, second.read_bytes()
    for content, message in ((other, "bytes instead of"), (other[:size], "damaged or another")):
        first.write_bytes(content)
        with pytest.raises(FastElectraError, match=rf"{first.name} .*{message}"):
            open_corpus(out)


def test_a_tokenizer_of_another_corpus(out, corpus):
    shutil.copy(corpus.tokenizer_dir / "tokenizer.json", out / "tokenizer/tokenizer.json")
    with pytest.raises(FastElectraError, match=r"tokenizer\.json is damaged or of another"):
        open_corpus(out)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 99}'])
def test_a_bad_manifest(out, content):
    (out / "manifest.json").write_text(content)
    with pytest.raises(FastElectraError, match="prepare it again"):
        open_corpus(out)


def test_fingerprints_tell_tokenizers_and_settings_apart(out, tmp_path):
    corpus = open_corpus(out)
    text = tmp_path / "a.txt"
    vocab = out / "tokenizer/vocab.txt"
    assert prepare(text, "--out", tmp_path / "same", "--vocab", vocab) == 0
    assert prepare(text, "--out", tmp_path / "other", "--vocab-size", 310) == 0
    same, other = open_corpus(tmp_path / "same"), open_corpus(tmp_path / "other")
    assert same.fingerprint != corpus.fingerprint
    assert same.tokenizer_fingerprint == corpus.tokenizer_fingerprint
    assert other.tokenizer_fingerprint != corpus.tokenizer_fingerprint
