"""The vocabulary that `prepare` trains or is given, and how text is normalised for it."""

import numpy as np
import pytest
from texts import prepare
from tokenizers import Tokenizer

from fastelectra.data.shards import open_corpus


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    vocab = tmp_path / "vocab.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(70_000))]
    vocab.write_text("\n".join(words) + "\n")
    (tmp_path / "a.txt").write_text("w1 w69999 what")
    assert prepare(tmp_path / "a.txt", "--vocab", vocab, "--out", tmp_path / "out") == 0
    (shard,) = open_corpus(tmp_path / "out").split("train")
    assert shard.tokens.dtype == np.uint32
    assert shard.tokens.tolist() == [6, 70_004, 1]


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_a_folder_with_a_vocabulary(name, corpus, text_file, tmp_path):
    (tmp_path / name).write_bytes((corpus.tokenizer_dir / name).read_bytes())
    assert prepare(text_file, "--vocab", tmp_path, "--out", tmp_path / "out") == 0
    fingerprint = open_corpus(tmp_path / "out").tokenizer_fingerprint
    assert fingerprint == corpus.tokenizer_fingerprint
    prepared = ("--vocab", tmp_path / "out", "--out", tmp_path / "again")
    assert prepare(text_file, *prepared) == 0
    assert open_corpus(tmp_path / "again").tokenizer_fingerprint == fingerprint


def test_a_vocabulary_is_read_as_its_folder_says_unless_an_option_does(tmp_path, capsys):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] Zürich zürich"
    (tmp_path / "vocab.txt").write_text(words.replace(" ", "\n"), encoding="utf-8")
    (tmp_path / "a.txt").write_text("Zürich", encoding="utf-8")
    unknown = "warning: 100% of the tokens are [UNK]: is the vocabulary, given or trained, of"
    for lower, option, token in (
        ("false", [], 5), ("false", ["--keep-accents"], 5), ("true", ["--keep-accents"], 6),
        ("true", ["--cased"], 5),
    ):  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(f'{{"do_lower_case": {lower}}}')
        out = tmp_path / f"out{lower}{token}{option}"
        assert prepare(tmp_path / "a.txt", "--vocab", tmp_path, "--out", out, *option) == 0
        assert open_corpus(out).split("train")[0].tokens.tolist() == [token]
    assert unknown not in capsys.readouterr().err
    (tmp_path / "tokenizer_config.json").unlink()
    assert prepare(tmp_path / "a.txt", "--vocab", tmp_path, "--out", tmp_path / "out") == 0
    assert unknown in capsys.readouterr().err


def test_styles_reach_the_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("Zürich " * 50, encoding="utf-8")
    for options, text in {
        (): "zurich",
        ("--keep-accents",): "zürich",
        ("--cased",): "Zürich",
    }.items():
        out = tmp_path / f"out{len(text.encode())}{text[0]}"
        assert prepare(tmp_path / "a.txt", "--out", out, "--vocab-size", 60, *options) == 0
        tokenizer = Tokenizer.from_file(str(out / "tokenizer/tokenizer.json"))
        assert tokenizer.encode("Zürich", add_special_tokens=False).tokens == [text]


HARMED = {  # by the removal of accents; None: not
    "これは日本語の文章です。ガラスです。": "HIRAGANA LETTER DE",
    "यह हिन्दी का वाक्य है।": "DEVANAGARI SIGN VIRAMA",
    "ฉันไปโรงเรียนที่นี่": "THAI CHARACTER",
    "나는 학교에 갑니다.": "HANGUL SYLLABLE",
    "Tiếng Việt, người ta nói được": "LATIN SMALL LETTER",
    "Ёлка й Zürich, Škoda, Ελλάδα, cafe\u0301": None,
}


@pytest.mark.parametrize("sentence", HARMED)
def test_where_accents_are_parts_of_letters_their_removal_is_warned_of(sentence, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(f"{sentence}\n\n" * 99, encoding="utf-8")
    assert prepare(tmp_path / "a.txt", "--out", tmp_path / "out", "--vocab-size", 300) == 0
    warning, harm = capsys.readouterr().err, HARMED[sentence]
    assert ("removal of accents" in warning) == (harm is not None)
    assert harm is None or (harm in warning and "--keep-accents" in warning)
    options = ("--keep-accents", "--out", tmp_path / "kept")
    assert prepare(tmp_path / "a.txt", *options, "--vocab-size", 300) == 0
    assert "removal of accents" not in capsys.readouterr().err
