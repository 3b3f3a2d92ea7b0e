"""Files of every kind to documents; what cannot be read is named."""

import errno
import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fastelectra.data import reader, sources
from fastelectra.data.reader import Reader
from fastelectra.data.sources import Skipped, find_sources
from fastelectra.errors import FastElectraError

DOCUMENTS = [["The chef cooked.", "It was good."], ["Zürich, 東京 😀"], ["a", "b", "c"]]


def read(*inputs, documents="blank-line", field="text", skipped=None):
    """The documents as lists of lines."""
    result, lines = [], []
    found = find_sources([str(name) for name in inputs])
    for line in Reader(found, documents, field, Skipped() if skipped is None else skipped):
        if line is not None:
            assert line == line.strip() != ""
            lines.append(line)
        elif lines:
            result.append(lines)
            lines = []
    assert not lines
    return result


def as_txt(documents) -> bytes:
    return "\n\n".join("\n".join(lines) for lines in documents).encode()


def as_jsonl(documents) -> bytes:
    return b"".join(json.dumps({"text": "\n".join(d)}).encode() + b"\n" for d in documents)


def as_parquet(documents) -> bytes:
    sink = pyarrow.BufferOutputStream()
    texts = ["\n".join(lines) for lines in documents]
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


WRITERS = {".txt": as_txt, ".jsonl": as_jsonl, ".parquet": as_parquet}
PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_documents(kind, packing, tmp_path):
    file = tmp_path / f"text{kind}{packing}"
    file.write_bytes(PACKERS[packing](WRITERS[kind](DOCUMENTS)))
    assert read(file) == DOCUMENTS


def test_two_zstd_frames_and_two_gzip_members_are_read_through(tmp_path):
    for packing in (".gz", ".zst"):
        parts = [PACKERS[packing](as_jsonl([lines])) for lines in DOCUMENTS]
        (tmp_path / f"text.jsonl{packing}").write_bytes(b"".join(parts))
        assert read(tmp_path / f"text.jsonl{packing}") == DOCUMENTS


def test_what_a_document_of_a_text_file_is(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(as_txt(DOCUMENTS))
    lines = [line for document in DOCUMENTS for line in document]
    assert read(file, documents="file") == [lines]
    assert read(file, documents="line") == [[line] for line in lines]


def test_files_end_documents(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == [["a.txt"], ["b.txt"]]


def test_line_ends_blank_lines_byte_order_marks_and_nuls(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\x00\r\n \t\r\n\r\n\xc2\xa0\nthree  \r\n\x00\r\nfour")
    assert read(file) == [["one", "two"], ["three"], ["four"]]


def test_blank_lines_inside_a_record_do_not_end_it(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "a\n\nb\u0000\r\nc"}) + "\n\n" + '{"text": null}\n')
    assert read(file) == [["a", "b", "c"]]


def test_another_field(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"body": "a", "text": "b"}\n')
    assert read(file, field="body") == [["a"]]


@given(
    text=st.text(alphabet="ab é東😀\n\t.", max_size=300),
    limit=st.integers(8, 40),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
)
@settings(deadline=None)
def test_long_lines_are_cut_and_nothing_is_lost(tmp_path_factory, text, limit, newline):
    file = tmp_path_factory.mktemp("long") / "text.txt"
    file.write_bytes(text.replace("\n", newline).encode())
    whole = read(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "LINE_BYTES", limit)
        cut = read(file)
    assert ["".join("".join(d).split()) for d in cut] == [
        "".join("".join(d).split()) for d in whole
    ]
    assert all(len(line.encode()) <= limit for document in cut for line in document)


def test_a_long_line_is_cut_between_words(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "LINE_BYTES", 12)
    (tmp_path / "text.txt").write_text("one two three four five\nsix\n\nseven")
    (first, second) = read(tmp_path / "text.txt")
    assert " ".join(first) == "one two three four five six"
    assert second == ["seven"]


class TestFinding:
    def test_folders_globs_and_repeats(self, tmp_path):
        texts = ("b/2.txt", "a/1.txt.gz", "3.jsonl", "README.md", ".hidden/4.txt")
        tokenizer = ("corpus/tokenizer/vocab.txt", "corpus/tokenizer/tokenizer_config.json")
        for name in texts + tokenizer:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        (tmp_path / "link.txt").symlink_to(tmp_path / "b/2.txt")

        def names(*inputs):
            return [os.path.relpath(source.path, tmp_path) for source in find_sources(inputs)]

        assert names(str(tmp_path)) == ["3.jsonl", "a/1.txt.gz", "b/2.txt"]
        assert names(f"{tmp_path}/*/*.txt*") == ["a/1.txt.gz", "b/2.txt"]
        assert names(f"{tmp_path}/[ab]") == ["a/1.txt.gz", "b/2.txt"]
        assert names(f"{tmp_path}/b", f"{tmp_path}/b/../b/2.txt") == ["b/2.txt"]

    def test_links_to_folders_are_followed_once(self, tmp_path, monkeypatch):
        for name in ("in/a/1.txt", "in/z.txt", "out/b/2.txt", "out/3.txt"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x")
        for link, target in (("in/0", "in/a"), ("in/y", "out"), ("in/x", "out"), ("out/b/up", "in"),
                             ("in/away", "nowhere"), ("in/loop", "in/loop")):  # fmt: skip
            (tmp_path / link).symlink_to(tmp_path / target)
        (tmp_path / "0.txt").write_text("beside the input")
        (tmp_path / "in/a/top").symlink_to(tmp_path)
        texts = ("in/a/1.txt", "in/z.txt", "out/3.txt", "out/b/2.txt")
        monkeypatch.chdir(tmp_path)
        for name in ("in", f"{tmp_path}/in"):
            found = [os.path.realpath(source.path) for source in find_sources([name])]
            assert found == [f"{tmp_path}/{text}" for text in texts]

    def test_a_link_that_cannot_be_followed_is_an_error(self, tmp_path, monkeypatch):
        (tmp_path / "a.txt").write_text("a")
        (tmp_path / "closed").symlink_to(tmp_path)
        find_sources([str(tmp_path)])
        whole = os.stat

        def closed(path, *others, **options):
            if str(path).endswith("closed"):
                raise PermissionError(errno.EACCES, "Permission denied")
            return whole(path, *others, **options)

        monkeypatch.setattr(os, "stat", closed)
        with pytest.raises(PermissionError):
            find_sources([str(tmp_path)])

    def test_what_prepare_has_made_is_no_text(self, tmp_path):
        for name in ("data/a.txt", "data/corpus/manifest.json", "data/corpus/skipped.jsonl",
                     "data/skipped.jsonl"):  # fmt: skip
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x")
        found = [source.path for source in find_sources([f"{tmp_path}/data"])]
        assert found == [f"{tmp_path}/data/a.txt", f"{tmp_path}/data/skipped.jsonl"]

    @pytest.mark.parametrize(
        ("name", "message"),
        [("absent.txt", "no such file"), ("*.jsonl", "no such file"), ("notes.md", "unknown kind"),
         ("empty", "no text in there")],
    )  # fmt: skip
    def test_what_is_not_there(self, name, message, tmp_path):
        (tmp_path / "notes.md").write_text("x")
        (tmp_path / "empty").mkdir()
        with pytest.raises(FastElectraError, match=message):
            find_sources([str(tmp_path / name)])

    def test_a_file_of_another_century(self, tmp_path):
        (tmp_path / "a.txt").write_text("a")
        os.utime(tmp_path / "a.txt", (10_500_000_000, 10_500_000_000))  # 2302
        skipped = Skipped()
        assert read(tmp_path, skipped=skipped) == [["a"]]
        assert not skipped


GOOD = [["good"], ["last"]]
UTF_16 = "UTF-16, not UTF-8: convert it (iconv -f utf-16 -t utf-8)"
DAMAGED = {  # content, what is read of it, what is said of the rest
    "latin.txt": (b"good\ncaf\xe9\n\n\xe9 1\nlast", GOOD, ("line is not UTF-8", 2, "byte 5")),
    "end.txt": (b"good\n\nlast\ncaf\xe9", GOOD, ("line is not UTF-8", 1, "byte 11")),
    "latin.txt.gz": (
        gzip.compress(b"good\n\ncaf\xe9\nlast"),
        GOOD,
        ("line is not UTF-8", 1, "byte of the unpacked text 6"),
    ),
    "utf16.txt": ("Привет\n".encode("utf-16"), [], (UTF_16, 1)),
    "utf16.jsonl.gz": (gzip.compress("\ufeff{}".encode("utf-16-be")), [], (UTF_16, 1)),
    "text.txt.gz": (b"plain text", [], ("damaged, cut off or not gzip from some place on", 1)),
    "text.txt.zst": (b"plain text", [], ("damaged or not zstd from some place on", 1)),
    "cut.txt.zst": (zstandard.ZstdCompressor().compress(b"abcdefgh" * 9)[:-5], [], ("cut off", 1)),
    "broken.jsonl": (b'{"text": "good"}\n{"text": \n{"text": "last"}', GOOD,
                     ("line is not JSON", 1, "line 2")),
    "digits.jsonl": (b'{"text": ' + b"1" * 5000 + b"}", [], ("line is not JSON", 1, "line 1")),
    "deep.jsonl": (b"[" * 10**5, [], ("line is not JSON", 1, "line 1")),
    "surrogate.jsonl": (
        rb'{"text": "\ud800"}', [], ("text is not valid Unicode", 1, "line 1")
    ),
    "latin.jsonl": (b'{"text": "good"}\n{"text": "\xe9"}\n{"text": "last"}', GOOD,
                    ("line is not UTF-8", 1, "line 2")),
    "lacking.jsonl": (b'{"text": "good"}\n{"id": 1}\n[]\n{"text": "last"}', GOOD,
                      ("no field 'text'", 2, "line 2")),
    "number.jsonl": (b'{"text": "good"}\n{"text": 5}\n{"text": "last"}', GOOD,
                     ("field 'text' is not text but int", 1, "line 2")),
    "text.parquet": (b"plain text", [], ("damaged or not Parquet from some place on", 1)),
    "empty.parquet": (b"", [], ("damaged or not Parquet from some place on", 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_skipped_and_listed(name, tmp_path):
    content, documents, (reason, count, *first) = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    skipped = Skipped()
    assert read(tmp_path / name, skipped=skipped) == documents
    (record,) = map(json.loads, skipped.to_jsonl(tmp_path))
    assert record == {"file": name, "reason": reason, "count": count} | (
        {"first": first[0]} if first else {}
    )


def test_what_comes_before_the_damage_is_read(tmp_path):
    whole = [[f"{number} {'x' * 60}"] for number in range(60_000)]
    text = as_txt(whole)
    for name, pack in (("a.txt.gz", gzip.compress), ("a.txt.zst", PACKERS[".zst"])):
        packed = pack(text)
        (tmp_path / name).write_bytes(packed[: len(packed) // 2])
        skipped = Skipped()
        documents = read(tmp_path / name, skipped=skipped)
        assert 10_000 < len(documents) < 50_000
        assert documents[:-1] == whole[: len(documents) - 1]
        assert skipped.by_reason().total() == 1


class TestChanging:
    """A folder that changes between listing and reading."""

    def read(self, tmp_path, change):
        for name in ("a.txt", "b.txt"):
            (tmp_path / name).write_text(name)
        found, skipped = find_sources([str(tmp_path)]), Skipped()
        change(tmp_path / "b.txt")
        lines = [line for line in Reader(found, "blank-line", "text", skipped) if line]
        return lines, dict(skipped.by_reason())

    def test_a_file_that_vanishes(self, tmp_path):
        lines, skipped = self.read(tmp_path, lambda file: file.unlink())
        assert (lines, skipped) == (["a.txt"], {"No such file or directory": 1})

    def test_a_file_that_grows(self, tmp_path):
        lines, skipped = self.read(tmp_path, lambda file: file.write_text("b.txt\nmore"))
        assert (lines, skipped) == (["a.txt", "b.txt", "more"], {"changed while it was read": 1})

    def test_a_folder_in_its_place(self, tmp_path):
        lines, skipped = self.read(tmp_path, lambda file: (file.unlink(), file.mkdir()))
        assert (lines, skipped) == (["a.txt"], {"Is a directory": 1})

    def test_a_file_that_vanishes_while_files_are_listed(self, tmp_path, monkeypatch):
        for name in ("a.txt", "b.txt"):
            (tmp_path / name).write_text(name)
        below = sources._below

        def vanish(*arguments):
            found = list(below(*arguments))
            (tmp_path / "b.txt").unlink(missing_ok=True)
            return found

        monkeypatch.setattr(sources, "_below", vanish)
        assert [Path(source.path).name for source in find_sources([str(tmp_path)])] == ["a.txt"]

    @pytest.mark.parametrize("call", ["stat", "scandir"])
    def test_what_cannot_be_looked_at_is_an_error(self, tmp_path, monkeypatch, call):
        (tmp_path / "folder").mkdir()
        for name in ("a.txt", "folder/b.txt"):
            (tmp_path / name).write_text(name)
        look = getattr(os, call)

        def refuse(path, *args, **options):
            if "folder" in os.fspath(path):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return look(path, *args, **options)

        monkeypatch.setattr(os, call, refuse)
        with pytest.raises(PermissionError, match="folder"):
            find_sources([str(tmp_path)])


OTHER_FIELD = {
    "list.jsonl": (b"[1]\n", "line 1: no field 'text'"),
    "empty.jsonl": (b"{}\n", r"no field 'text' \(there is none\)"),
    "names.jsonl": (b'{"body": "a"}\n', r"no field 'text' \(there is body\); name it with --field"),
    "number.jsonl": (b'{"text": 5}\n', "line 1: field 'text' is not text but int"),
    "names.parquet": (as_parquet([["a"]]).replace(b"text", b"body"), "no column 'text'.*--field"),
}


@pytest.mark.parametrize("name", OTHER_FIELD)
def test_records_of_another_kind_are_refused(name, tmp_path):
    content, message = OTHER_FIELD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FastElectraError, match=message) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_that_another_file_has_the_field_does_not_excuse_a_file_without_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"body": "b"}\n')
    with pytest.raises(FastElectraError, match=r"b\.jsonl, line 1: no field 'text'"):
        read(tmp_path)


def test_a_jsonl_line_that_would_take_too_much_memory_is_skipped(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "%s"}\n{"text": "b"}\n' % ("x" * (1 << 25)))
    skipped = Skipped()
    assert read(tmp_path / "text.jsonl", skipped=skipped) == [["b"]]
    assert skipped.by_reason().total() == 1


@pytest.mark.parametrize(("name", "module"), [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")])
def test_a_missing_package_is_named(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        FastElectraError, match=rf"needs {module}: pip install 'fastelectra\[data\]'"
    ):
        read(tmp_path / name)


def test_progress_counts_the_bytes_of_the_files(tmp_path):
    for kind, write in WRITERS.items():
        (tmp_path / f"text{kind}.gz").write_bytes(gzip.compress(write(DOCUMENTS * 50)))
    found = find_sources([str(tmp_path)])
    reader = Reader(found, "blank-line", "text", Skipped())
    seen = [reader.bytes_read for _ in reader]
    assert seen == sorted(seen)
    assert reader.bytes_read == sum(source.size for source in found)
