"""Corpora and sources that somebody made to do harm, or that a disk or a network mangled.

Only FastElectraError comes out, and nothing outside the folder is read.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
from itertools import islice

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sources import DOCUMENTS, PACKERS, WRITERS

from fastelectra.config import DataConfig
from fastelectra.data import parquet, reader, vocabulary
from fastelectra.data.batch import BatchShape
from fastelectra.data.reader import Reader
from fastelectra.data.shards import SUFFIXES, file_sha256, open_corpus, sample_sha256
from fastelectra.data.sources import Skipped, find_sources
from fastelectra.data.stream import BatchStream, Position
from fastelectra.errors import FastElectraError

EXAMPLES = int(os.environ.get("FASTELECTRA_FUZZ", "60"))  # of each test
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
)

NUMBERS = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 2, 4, 2**31, 2**63, 10**30])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def copy(corpus, tmp_path_factory):
    """A corpus of our own to damage."""
    return shutil.copytree(corpus.path, tmp_path_factory.mktemp("hostile") / "corpus")


def is_used(folder) -> bool:
    """Open, verify and train on it; False if it is refused."""
    try:
        corpus = open_corpus(folder)
        corpus.verify()
        data = DataConfig(path=str(folder), max_length=48)
        shape = BatchShape.of(256, 48, 0.15)
        for split in ("train", "heldout"):
            stream = BatchStream(corpus.split(split), corpus.special, data, shape, 1, 0)
            for (batch,), _ in islice(stream.steps(Position(), 0, 0, 1), 3):
                assert 0 <= batch.tokens.min() <= batch.tokens.max() < corpus.vocab_size
    except FastElectraError:
        return False
    return True


def sign(folder, values: dict) -> None:
    """Write a manifest whose checksums are right, as one who means harm would."""
    try:
        for entry in values["shards"]:
            for suffix in SUFFIXES:
                file = folder / f"{entry['name']}.{suffix}"
                entry["sha256"][suffix] = file_sha256(file)
                entry["sample_sha256"][suffix] = sample_sha256(file)
        values["tokenizer_fingerprint"] = file_sha256(folder / "tokenizer/tokenizer.json")
    except (KeyError, TypeError, ValueError, OSError):
        pass  # what has been changed cannot be signed
    rest = {name: value for name, value in values.items() if name not in ("format", "fingerprint")}
    text = json.dumps([values.get("format"), rest], sort_keys=True)
    values["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(values))


@st.composite
def mangled(draw, content: bytes) -> bytes:
    """Random bytes, or the content cut off, or a few of its bytes changed."""
    how = draw(st.sampled_from(["random", "cut", "change"]))
    if how == "random" or not content:
        return draw(st.binary(max_size=300))
    places = st.integers(0, len(content) - 1)
    if how == "cut":
        return content[: draw(places)]
    changed = bytearray(content)
    for place in draw(st.lists(places, min_size=1, max_size=8)):
        changed[place] = draw(st.integers(0, 255))
    return bytes(changed)


def mutate(draw, value):
    """Put something else somewhere into a JSON value."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 9)) == 0:
        return draw(JSON)
    keys = sorted(value) if isinstance(value, dict) else range(len(value))
    key = draw(st.sampled_from(keys))
    if draw(st.integers(0, 9)) == 0:
        del value[key]
    else:
        value[key] = mutate(draw, value[key])
    return value


@pytest.fixture
def damage(copy):
    """Files of `copy` to change; made whole again afterwards."""
    shards = [f"{split}-00000.{suffix}" for split in ("train", "heldout") for suffix in SUFFIXES]
    names = ["manifest.json", "tokenizer/tokenizer.json", *shards]
    whole = {name: (copy / name).read_bytes() for name in names}

    class Damage:
        folder, content = copy, whole

        def __enter__(self):
            return json.loads(whole["manifest.json"])

        def __exit__(self, *_):
            for name, content in whole.items():
                (copy / name).write_bytes(content)

    return Damage()


def test_what_is_signed_and_not_damaged_is_used(damage):
    with damage as manifest:
        sign(damage.folder, manifest)
        assert json.loads((damage.folder / "manifest.json").read_text()) == json.loads(
            damage.content["manifest.json"]
        )
        assert is_used(damage.folder)


@given(data=st.data())
@fuzz
def test_mangled_files_are_refused(damage, data):
    name = data.draw(st.sampled_from(sorted(damage.content)))
    content = data.draw(mangled(damage.content[name]))
    with damage as manifest:
        (damage.folder / name).write_bytes(content)
        if is_used(damage.folder):  # a space that became a tab, or nothing that changed
            assert json.loads((damage.folder / "manifest.json").read_bytes()) == manifest
            assert content == damage.content[name] or name == "manifest.json"


@given(data=st.data())
@fuzz
def test_a_signed_manifest_that_says_anything(damage, data):
    with damage as manifest:
        values = mutate(data.draw, manifest)
        if isinstance(values, dict):
            sign(damage.folder, values)
        else:
            (damage.folder / "manifest.json").write_text(json.dumps(values))
        is_used(damage.folder)


@given(data=st.data())
@fuzz
def test_signed_shards_of_any_numbers(damage, data):
    with damage as manifest:
        entry = data.draw(st.sampled_from(manifest["shards"]))
        for suffix, dtype in (("tokens", "<u2"), ("lines", "<u4")):
            file = damage.folder / f"{entry['name']}.{suffix}"
            numbers = np.frombuffer(file.read_bytes(), dtype).copy()
            if data.draw(st.booleans()):
                numbers = numbers[: data.draw(st.integers(0, 60))]
            most = np.iinfo(dtype).max
            for _ in range(data.draw(st.integers(0, 4)) if len(numbers) else 0):
                place = data.draw(st.integers(0, len(numbers) - 1))
                numbers[place] = data.draw(st.integers(0, most) | st.just(most))
            entry[suffix] = len(numbers)
            file.write_bytes(numbers.tobytes())
        sign(damage.folder, manifest)
        is_used(damage.folder)


@given(data=st.data())
@fuzz
def test_a_signed_tokenizer_of_any_content(damage, data):
    name = "tokenizer/tokenizer.json"
    with damage as manifest:
        if data.draw(st.booleans()):
            content = data.draw(mangled(damage.content[name]))
        else:
            content = json.dumps(mutate(data.draw, json.loads(damage.content[name]))).encode()
        (damage.folder / name).write_bytes(content)
        sign(damage.folder, manifest)
        is_used(damage.folder)


@given(data=st.data(), suffix=st.sampled_from([".txt", ".json"]))
@fuzz
def test_a_vocabulary_of_any_content(tmp_path_factory, corpus, data, suffix):
    source = {".txt": "vocab.txt", ".json": "tokenizer.json"}[suffix]
    file = tmp_path_factory.getbasetemp() / f"vocabulary{suffix}"
    file.write_bytes(data.draw(mangled((corpus.tokenizer_dir / source).read_bytes())))
    try:
        encode = vocabulary.line_encoder(vocabulary.read(file, True, True))
        encode(["The chef cooked the meal."])
    except FastElectraError:
        pass


@pytest.mark.parametrize(
    "name", ["../outside", "{folder}/../outside", "train-00000/../../outside", "./train-00000",
             "train-0", "train-٠٠٠٠٠", "train-00000\0", "train-00000\n", ""],
)  # fmt: skip
def test_names_stay_in_the_folder(name, damage):
    """The files outside are sound and their checksums right; they are not read all the same."""
    with damage as manifest:
        for suffix in SUFFIXES:
            shutil.copy(damage.folder / f"train-00000.{suffix}",
                        damage.folder.parent / f"outside.{suffix}")  # fmt: skip
        manifest["shards"][0]["name"] = name.format(folder=damage.folder)
        sign(damage.folder, manifest)
        with pytest.raises(FastElectraError, match=r"manifest\.json is damaged"):
            open_corpus(damage.folder)


@given(data=st.data(), kind=st.sampled_from([*WRITERS]), packing=st.sampled_from([*PACKERS]))
@fuzz
def test_sources_of_any_content(tmp_path_factory, data, kind, packing):
    """Mangled before or after it is packed."""
    content = WRITERS[kind](DOCUMENTS * 3)
    if data.draw(st.booleans()):
        content = PACKERS[packing](data.draw(mangled(content)))
    else:
        content = data.draw(mangled(PACKERS[packing](content)))
    file = tmp_path_factory.getbasetemp() / f"source{kind}{packing}"
    file.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "LINE_BYTES", data.draw(st.sampled_from([16, 100, 1 << 20])))
        try:
            for line in Reader(find_sources([str(file)]), "blank-line", "text", Skipped()):
                assert line is None or line.strip() == line != ""
        except FastElectraError:
            pass


@fuzz
@given(
    data=st.binary(max_size=300)
    | st.lists(st.sampled_from(b"\x15\x18\x19\x1c\x49\xff\0")).map(bytes)
)
def test_headers_and_footers_of_any_content(data):
    size = len(data).to_bytes(4, "little")
    assert parquet._largest_page(io.BytesIO(data), 0, len(data)) >= 0
    with contextlib.suppress(parquet.Damaged):
        assert all(
            a >= 0 and b <= len(data) + 8
            for group in parquet._chunks(io.BytesIO(data + size + b"PAR1"), "text")
            for a, b in group
        )


def test_a_column_whose_name_is_not_utf8(tmp_path):
    content = WRITERS[".parquet"](DOCUMENTS)
    (tmp_path / "a.parquet").write_bytes(content.replace(b"\x04text%", b"\x04\x80ext%"))
    skipped = Skipped()
    assert list(Reader(find_sources([str(tmp_path)]), "line", "text", skipped)) == [None]
    assert list(skipped.by_reason().values()) == [1]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_bomb_unpacks_in_bounded_memory(packing, tmp_path):
    """100 MB of nothing in a few kB: read piece by piece, and a line of it is cut."""
    (tmp_path / f"a.txt{packing}").write_bytes(PACKERS[packing](b"x" * 100_000_000))
    lines = Reader(find_sources([str(tmp_path)]), "blank-line", "text", Skipped())
    longest = max(len(line) for line in lines if line)
    assert longest <= reader.LINE_BYTES
