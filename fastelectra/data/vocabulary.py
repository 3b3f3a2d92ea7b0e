"""The WordPiece tokenizer: trained from text or read from a file, written for Hugging Face."""

import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from fastelectra.data.words import LineEncoder, SpacingTable
from fastelectra.errors import FastElectraError

FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")
WORDS_BYTES = 8 << 20  # of all different words to learn from, which takes 60 times as much memory
MOST_CHARACTERS = 100  # of a word; longer ones become [UNK], as BERT's do
_TOO_LONG = re.compile(rf"(?<![^ ])[^ ]{{{MOST_CHARACTERS + 1},}}")
BERT_TOKENIZERS = ("ElectraTokenizer", "ElectraTokenizerFast", "BertTokenizer", "BertTokenizerFast")
EUROPEAN = ("LATIN", "GREEK", "CYRILLIC", "COMBINING")  # characters' names begin so
PARTS = (" HORN", " HOOK ABOVE", " DOT BELOW")  # in names of letters: of Vietnamese and others
ALPHABET_LIMIT = 1000  # most frequent characters kept, as in the published BERT vocabularies


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the five special tokens."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, source: str) -> "SpecialTokens":
        """FastElectraError naming `source` when one of the five is missing."""
        ids = {name: tokenizer.token_to_id(token) for name, token in _SPECIAL.items()}
        missing = [_SPECIAL[name] for name, number in ids.items() if number is None]
        if missing:
            raise FastElectraError(
                f"{source}: the vocabulary lacks {' '.join(missing)}; ELECTRA needs"
                f" {' '.join(_SPECIAL.values())}"
            )
        return cls(**ids)


_SPECIAL = {name: f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


def train(texts: Iterable[str], size: int, lowercase: bool, strip_accents: bool) -> Tokenizer:
    """Train a WordPiece vocabulary of at most `size` entries; the same texts give the same one.

    The trainer numbers the continuation pieces (##x) in the order of a randomly seeded hash table
    and breaks ties by number. Announcing them as special tokens, sorted, settles the numbers. Its
    time grows with the square of a word's length: words that cannot be encoded are left out.
    """
    spacing = SpacingTable(_normalizer(lowercase, strip_accents), pre_tokenizers.BertPreTokenizer())
    words = (_TOO_LONG.sub("", text.translate(spacing)) for text in texts)
    texts = _thinned(text.encode() for text in words)  # in half the memory
    alphabet, inside = _characters(texts)
    if not alphabet:
        raise FastElectraError(
            f"the input has no words, of at most {MOST_CHARACTERS} characters, to train a"
            " vocabulary from"
        )
    known = [*_SPECIAL.values(), *alphabet, *(f"##{character}" for character in inside)]
    if size < len(known):
        raise FastElectraError(
            f"--vocab-size {size} is too small: special tokens and single characters of this text"
            f" are {len(known)} entries already"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=known, limit_alphabet=len(alphabet),
        initial_alphabet=alphabet, show_progress=False,
    )  # fmt: skip
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(map(bytes.decode, texts), trainer)
    ids = learner.get_vocab()
    return build(sorted(ids, key=ids.get), lowercase, strip_accents)


def _thinned(texts: Iterable[bytes]) -> list[bytes]:
    """All, or every second, fourth … of them, so that their words are within WORDS_BYTES.

    English has 2 MB in 70 MB of text.
    """
    taken, words, size, every = [], set(), 0, 1
    for number, text in enumerate(texts):
        if number % every:
            continue
        taken.append(text)
        new = set(text.split()) - words
        words |= new
        size += sum(map(len, new))
        while size > WORDS_BYTES and len(taken) > 1:
            every *= 2
            taken = taken[::2]
            words = {word for text in taken for word in text.split()}
            size = sum(map(len, words))
    return taken


def _characters(texts: list[bytes]) -> tuple[list[str], list[str]]:
    """The most frequent characters of words, and those of them seen inside a word; sorted."""
    counts = np.zeros(sys.maxunicode + 1, np.int64)
    inside = np.zeros(len(counts), bool)
    space = ord(" ")
    for text in texts:
        codes = np.frombuffer(text.decode().encode("utf-32-le"), np.uint32)
        counts += np.bincount(codes, minlength=len(counts))
        inside[codes[1:][codes[:-1] != space]] = True
    counts[space] = 0
    seen = np.flatnonzero(counts)
    kept = np.sort(seen[np.lexsort((seen, -counts[seen]))][:ALPHABET_LIMIT])
    return [chr(code) for code in kept], [chr(code) for code in kept if inside[code]]


def harmed_letters(characters: Counter[str]) -> Counter[str]:
    """Those that lose a part with their accents though it is none: vowel signs, voicing marks.

    In Latin, Greek and Cyrillic script an accent is one, but not a horn, hook or dot below, as in
    Vietnamese or Yoruba.
    """
    keep, strip = (_normalizer(False, strips).normalize_str for strips in (False, True))
    return Counter({
        character: count
        for character, count in characters.items()
        if keep(character) != strip(character)
        and _is_harmed(unicodedata.name(character, ""))
    })  # fmt: skip


def _is_harmed(name: str) -> bool:
    return not name.startswith(EUROPEAN) or any(mark in name for mark in PARTS)


def file_of(path: Path) -> Path:
    """Of a Hugging Face folder its tokenizer.json, else its vocab.txt; a file is itself.

    A prepared corpus has such a folder in it.
    """
    if not path.is_dir():
        return path
    path = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    names = [name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
    if not names:
        raise FastElectraError(f"{path} has no tokenizer: expected tokenizer.json or vocab.txt")
    return path / names[0]


def normalisation(file: Path) -> dict[str, bool]:
    """What to `read` a vocab.txt with: what a tokenizer_config.json beside it says, as BERT's does.

    Raises FastElectraError for a damaged one, and another tokenizer than BERT's, which vocab.txt
    alone does not describe. A tokenizer.json needs nothing.
    """
    config = file.with_name("tokenizer_config.json")
    if file.suffix == ".json":
        return {}
    try:
        told = json.loads(config.read_bytes()) if config.is_file() else {}
        kind = told.get("tokenizer_class") or BERT_TOKENIZERS[0]
    except (ValueError, AttributeError, RecursionError):
        raise FastElectraError(
            f"{config} is not a JSON object: mend it, or move {file.name} to another folder"
        ) from None
    if kind not in BERT_TOKENIZERS:
        raise FastElectraError(
            f"{config}: tokenizer_class {kind} needs a tokenizer.json: vocab.txt alone describes"
            " only a BertTokenizer or an ElectraTokenizer"
        )
    given = {name: value for name, value in told.items() if value is not None}
    lowercase = given.get("do_lower_case", True)
    style = {"do_lower_case": lowercase, "strip_accents": given.get("strip_accents", lowercase),
             "tokenize_chinese_chars": given.get("tokenize_chinese_chars", True)}  # fmt: skip
    for name, value in style.items():
        if type(value) is not bool:
            raise FastElectraError(f"{config}: {name} must be true or false, got {value!r}")
    words = {"lowercase": lowercase, "strip_accents": style["strip_accents"]}
    return words if style["tokenize_chinese_chars"] else words | {"split_chinese": False}


def read(
    path: Path, lowercase: bool = True, strip_accents: bool = True, split_chinese: bool = True
) -> Tokenizer:
    """Read a vocab.txt, or a tokenizer.json (which itself says how text is normalised)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise FastElectraError(f"{path} is not UTF-8 text") from None
    tokens = text.rstrip("\n").split("\n")
    is_json = path.suffix == ".json"
    style = lowercase, strip_accents, split_chinese
    tokenizer = _from_json(text, path) if is_json else build(tokens, *style)
    SpecialTokens.of(tokenizer, str(path))
    if not is_json:
        _check_unique(tokens, path)
    return tokenizer


def _check_unique(tokens: list[str], path: Path) -> None:
    first_line: dict[str, int] = {}
    for number, token in enumerate(tokens, start=1):
        if token in first_line:
            raise FastElectraError(
                f"{path}: {token!r} stands on line {first_line[token]} and again on line {number}"
            )
        first_line[token] = number


def _from_json(text: str, path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise FastElectraError(f"{path} is not a tokenizer.json: {error}") from None
    if not isinstance(tokenizer.model, models.WordPiece):
        raise FastElectraError(
            f"{path}: a {type(tokenizer.model).__name__} tokenizer; ELECTRA uses WordPiece"
        )
    if sorted(tokenizer.get_vocab().values()) != list(range(tokenizer.get_vocab_size())):
        raise FastElectraError(f"{path}: the ids of the vocabulary do not run from 0 without a gap")
    if tokenizer.token_to_id(tokenizer.model.unk_token) is None:
        raise FastElectraError(
            f"{path}: its unknown token {tokenizer.model.unk_token} is not in the vocabulary"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def build(
    tokens: list[str], lowercase: bool, strip_accents: bool, split_chinese: bool = True
) -> Tokenizer:
    """BERT's tokenizer over `tokens` in the order of their ids.

    split_chinese: whether every Chinese character is a word.
    """
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=MOST_CHARACTERS)
    )
    tokenizer.normalizer = _normalizer(lowercase, strip_accents, split_chinese)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    if "[CLS]" in ids and "[SEP]" in ids:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
        )
    tokenizer.add_special_tokens([token for token in _SPECIAL.values() if token in ids])
    return tokenizer


def _normalizer(
    lowercase: bool, strip_accents: bool, split_chinese: bool = True
) -> normalizers.BertNormalizer:
    return normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=split_chinese, strip_accents=strip_accents,
        lowercase=lowercase,
    )  # fmt: skip


def write(tokenizer: Tokenizer, folder: Path, max_length: int = 512) -> None:
    """Write tokenizer.json, vocab.txt and the tokenizer_config.json that AutoTokenizer reads.

    max_length: the positions of the model that it is for, to which AutoTokenizer truncates.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    ids = tokenizer.get_vocab()
    entries = "".join(f"{token}\n" for token in sorted(ids, key=ids.get))
    (folder / "vocab.txt").write_text(entries, encoding="utf-8", newline="\n")
    config = {f"{name}_token": token for name, token in _SPECIAL.items()}
    config["model_max_length"] = max_length
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    if normalizer.get("type") == "BertNormalizer":
        config["tokenizer_class"] = "ElectraTokenizer"
        config["do_lower_case"] = normalizer["lowercase"]
        config["strip_accents"] = normalizer["strip_accents"]
        config["tokenize_chinese_chars"] = normalizer["handle_chinese_chars"]
    else:  # anything else only tokenizer.json describes
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def files(folder: Path) -> dict[str, bytes]:
    """The content of the files that `write` makes, whatever else may lie there.

    Raises FastElectraError when there is no tokenizer, or it goes meanwhile.
    """
    found = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if not (folder.is_dir() and found.keys() & {"tokenizer.json", "vocab.txt"}):
        raise FastElectraError(f"{folder} has no tokenizer: expected tokenizer.json or vocab.txt")
    return found


def copy(folder: Path, to: Path) -> None:
    """Copy these files."""
    for name, content in files(folder).items():
        (to / name).write_bytes(content)


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a folder; FastElectraError when there is none to use."""
    return read(folder / "tokenizer.json")


def line_encoder(tokenizer: Tokenizer) -> LineEncoder:
    """What turns lines of text into token ids."""
    return LineEncoder(tokenizer, set(_SPECIAL.values()))
