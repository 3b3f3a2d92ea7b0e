"""Trained and given vocabularies: reproducible, and the same ids as in transformers."""

import json
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import SENTENCES, make_text
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from fastelectra.data import vocabulary
from fastelectra.errors import FastElectraError

STYLES = {"uncased": (True, True), "accents": (True, False), "cased": (False, False)}


@pytest.fixture(scope="module", params=STYLES)
def style(request):
    return STYLES[request.param]


@pytest.fixture(scope="module")
def tokenizer(style):
    return vocabulary.train(SENTENCES, 400, *style)


def entries(tokenizer):
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.get)


def test_a_trained_vocabulary_is_the_same_in_another_process():
    program = (
        "from fastelectra.data import vocabulary; import sys;"
        "ids = vocabulary.train(sys.stdin.read().split('\\n'), 600, True, True).get_vocab();"
        "print(*sorted(ids, key=ids.get), sep='\\n')"
    )
    text = make_text(60)
    runs = {
        subprocess.run(
            [sys.executable, "-c", program], input=text, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    here = vocabulary.train(text.split("\n"), 600, True, True)
    assert runs == {"\n".join(entries(here)) + "\n"}


def test_a_trained_vocabulary_begins_with_the_special_tokens_and_knows_every_character(tokenizer):
    assert entries(tokenizer)[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(entries(tokenizer)) == 400
    unknown = tokenizer.token_to_id("[UNK]")
    assert all(unknown not in tokenizer.encode(sentence).ids for sentence in SENTENCES)


def test_training_learns_frequent_words_whole():
    learned = vocabulary.train(["the river and the sea"] * 50, 60, True, True)
    assert learned.encode("the river", add_special_tokens=False).tokens == ["the", "river"]


def test_styles_differ_in_case_and_accents(style, tokenizer):
    tokens = tokenizer.normalizer.normalize_str("Zürich")
    assert tokens == {STYLES["uncased"]: "zurich", STYLES["accents"]: "zürich"}.get(style, "Zürich")


def test_transformers_gives_the_same_ids(tokenizer, tmp_path):
    vocabulary.write(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    lines = [*SENTENCES, "", "Straße ﬁn ½ ǅ \u00ad soft", "tab\tand\x00null\u200bzero", "x" * 300]
    ours = vocabulary.line_encoder(vocabulary.load(tmp_path))(lines)
    assert theirs(lines, add_special_tokens=False)["input_ids"] == ours
    pair = theirs("A café.", "Zürich!")
    encoded = tokenizer.encode("A café.", "Zürich!")
    assert (pair["input_ids"], pair["token_type_ids"]) == (encoded.ids, encoded.type_ids)
    assert theirs.mask_token_id == tokenizer.token_to_id("[MASK]")
    assert theirs.model_max_length == 512
    listed = (tmp_path / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    ids = {token: number for number, token in enumerate(listed)}
    assert ids == theirs.get_vocab() == tokenizer.get_vocab()


ENCODERS = {}
for _name, _style in STYLES.items():
    _tokenizer = vocabulary.train(SENTENCES, 400, *_style)
    ENCODERS[_name] = (_tokenizer, vocabulary.line_encoder(_tokenizer))


@given(text=st.text() | st.text(alphabet="abcÉé\u0301ß,.!'’–— \t\n\x00\u00ad東한각²½İΣςﬁ😀[MASK]"))
@settings(max_examples=300, deadline=None)
def test_encoding_from_memory_equals_the_tokenizer(text):
    for style, (tokenizer, encode) in ENCODERS.items():
        assert encode([text]) == [tokenizer.encode(text, add_special_tokens=False).ids], style


def test_special_tokens_in_the_text_are_text(tokenizer):
    special = {tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}
    (ids,) = vocabulary.line_encoder(tokenizer)(["a [MASK] b [SEP] [CLS] [PAD]"])
    assert ids
    assert not special & set(ids)


def test_a_vocabulary_that_is_given_is_kept(tmp_path, tokenizer, style):
    vocabulary.write(tokenizer, tmp_path)
    expected = vocabulary.line_encoder(tokenizer)(SENTENCES)
    for name in ("vocab.txt", "tokenizer.json"):
        again = vocabulary.read(tmp_path / name, *style)
        assert again.get_vocab() == tokenizer.get_vocab()
        assert vocabulary.line_encoder(again)(SENTENCES) == expected


STATED = [{}, {"do_lower_case": False}, {"do_lower_case": True, "strip_accents": False},
          {"do_lower_case": False, "strip_accents": True}, {"tokenize_chinese_chars": False},
          {"strip_accents": None}]  # fmt: skip


@pytest.mark.parametrize("stated", STATED, ids=str)
def test_what_a_folder_says_of_its_vocabulary_holds_as_in_transformers(stated, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Zürich", "zürich", "Zurich", "zurich",
             "東", "京", "東京"]  # fmt: skip
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(words) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "BertTokenizer", **stated}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = vocabulary.read(file, **vocabulary.normalisation(file))
    theirs = AutoTokenizer.from_pretrained(tmp_path)(["Zürich 東京"], add_special_tokens=False)
    assert vocabulary.line_encoder(ours)(["Zürich 東京"]) == theirs["input_ids"]


@pytest.mark.parametrize("content", ["[]", "{", "null"])
def test_a_damaged_description_of_a_vocabulary_is_named(content, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(FastElectraError, match=r"tokenizer_config\.json is not a JSON object"):
        vocabulary.normalisation(tmp_path / "vocab.txt")


def test_a_vocabulary_that_an_editor_has_saved(tmp_path):
    """With a byte order mark, carriage returns, and empty lines at the end."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    text = "\ufeff" + "".join(f"{word}\r\n" for word in [*words, "", ""])
    (tmp_path / "vocab.txt").write_bytes(text.encode())
    assert entries(vocabulary.read(tmp_path / "vocab.txt", True, True)) == words


def test_a_tokenizer_with_other_normalisation_works_and_loads_in_transformers(tmp_path, tokenizer):
    description = json.loads(tokenizer.to_str())
    description["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
    file = tmp_path / "given.json"
    file.write_text(json.dumps(description))
    given_tokenizer = vocabulary.read(file, True, True)
    vocabulary.write(given_tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)(SENTENCES, add_special_tokens=False)
    assert vocabulary.line_encoder(given_tokenizer)(SENTENCES) == theirs["input_ids"]


def write_bpe(path):
    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(path))


def write_gap(path):
    ids = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 9}
    Tokenizer(models.WordPiece(ids, unk_token="[UNK]")).save(str(path))


def write_unknown(path):
    ids = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    Tokenizer(models.WordPiece(ids, unk_token="<unk>")).save(str(path))


BAD = {
    "unknown.json": (write_unknown, "unknown token <unk>"),
    "bpe.json": (write_bpe, "WordPiece"),
    "gap.json": (write_gap, "gap"),
    "broken.json": (lambda path: path.write_text("{"), "not a tokenizer.json"),
    "lacking.txt": (lambda path: path.write_text("[PAD]\n[UNK]\n[CLS]\na\n"), r"\[SEP\] \[MASK\]"),
    "twice.txt": (
        lambda path: path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\na\n"),
        "line 6 and again on line 8",
    ),
    "latin.txt": (lambda path: path.write_bytes(b"caf\xe9\n"), "UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_vocabularies_are_refused(name, tmp_path):
    make, message = BAD[name]
    make(tmp_path / name)
    with pytest.raises(FastElectraError, match=message):
        vocabulary.read(tmp_path / name, True, True)


def test_a_size_below_the_alphabet_is_refused():
    with pytest.raises(FastElectraError, match="too small"):
        vocabulary.train(SENTENCES, 20, True, True)


def test_words_that_all_differ_thin_the_sample(monkeypatch):
    """Identifiers, say: 63 MB of them took 3.6 GB."""
    monkeypatch.setattr(vocabulary, "WORDS_BYTES", 100)
    texts = [f"{' '.join(f'{n}x{m}' for m in range(3))}".encode() for n in range(10, 50)]
    taken = vocabulary._thinned(texts)  # each has 12 bytes
    assert taken == texts[::8]
    assert vocabulary._thinned([b"same words"] * 1000) == [b"same words"] * 1000
    assert vocabulary._thinned([b"x" * 1000]) == [b"x" * 1000]


def test_words_that_cannot_be_encoded_are_not_learnt_from():
    """What the trainer takes for one grows with the square of its length: minutes for 1 MB."""
    rng = random.Random(0)
    most = "".join(rng.choices("abc", k=vocabulary.MOST_CHARACTERS))
    texts = ["ab abc " * 50, f"{most} {'d' * 3_000} {most}d"]
    entries = vocabulary.train(texts, 400, True, True).get_vocab()
    assert most in entries
    assert "d" not in entries
