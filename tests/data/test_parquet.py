"""Parquet: what is read of any writer's files, in bounded memory, past what is damaged."""

import base64
import json

import pyarrow
import pyarrow.parquet
import pytest
from pyarrow.parquet import encryption
from test_sources import GOOD, as_parquet, read

from fastelectra.data import parquet, reader
from fastelectra.data.sources import Skipped
from fastelectra.errors import FastElectraError


def test_a_row_of_bad_utf8_is_skipped(tmp_path):
    texts = pyarrow.array([b"good", b"caf\xe9", b"last"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    skipped = Skipped()
    assert read(tmp_path / "a.parquet", skipped=skipped) == GOOD
    assert skipped.by_reason() == {"row is not UTF-8": 1}


def test_rows_of_large_pages_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    """Memory stays bounded: 64 rows of 4 MB each took 1.1 GB."""
    taken, iterate = [], pyarrow.parquet.ParquetFile.iter_batches

    def spy(file, batch_size, **settings):
        taken.append(batch_size)
        return iterate(file, batch_size=batch_size, **settings)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", spy)
    documents = [[f"{n} " + "x" * 1000] for n in range(100)]
    (tmp_path / "a.parquet").write_bytes(as_parquet(documents))
    assert read(tmp_path / "a.parquet") == documents
    monkeypatch.setattr(parquet, "PAGE_BYTES", 250_000)  # the page has 100 690 and lengths
    assert read(tmp_path / "a.parquet") == documents
    assert taken == [64, 2]


def test_a_row_group_with_a_page_that_is_too_large_costs_itself_only(tmp_path, monkeypatch):
    texts = [f"{n} {'x' * 100}" for n in range(10)]
    texts[4] = texts[4] * 20
    table = pyarrow.table({"id": range(10), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    monkeypatch.setattr(parquet, "PAGE_BYTES", 1000)
    skipped = Skipped()
    assert read(tmp_path / "a.parquet", skipped=skipped) == [
        [text] for n, text in enumerate(texts) if n not in (4, 5)
    ]
    (record,) = map(json.loads, skipped.to_jsonl(tmp_path))
    assert (record["first"], record["count"]) == ("row 5", 1)
    assert "page" in record["reason"]


def test_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(FastElectraError, match="several columns 'text'"):
        read(tmp_path / "a.parquet")


def test_a_structure_before_a_column_of_a_name_with_a_dot(tmp_path):
    table = pyarrow.table({"a": [{"b": "in vain"}], "a.b": ["good"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", field="a.b") == [["good"]]


class _Keys(encryption.KmsClient):
    """Keeps keys as they are."""

    def wrap_key(self, key, _):
        return base64.b64encode(key)

    def unwrap_key(self, key, _):
        return base64.b64decode(key)


@pytest.mark.parametrize("hidden", ["text", "id"])
def test_encrypted_columns(tmp_path, hidden):
    """pyarrow's own look at one of them ends the process."""
    factory = encryption.CryptoFactory(lambda _: _Keys())
    configuration = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"c": [hidden]}, plaintext_footer=True
    )
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), configuration)
    table = pyarrow.table({"id": [1, 2], "text": ["good", "last"]})
    file = tmp_path / "a.parquet"
    with pyarrow.parquet.ParquetWriter(
        file, table.schema, encryption_properties=properties
    ) as writer:
        writer.write_table(table)
    skipped = Skipped()
    assert read(file, skipped=skipped) == (GOOD if hidden == "id" else [])
    assert bool(skipped) == (hidden == "text")


WRITTEN = {  # by other settings than the defaults
    "version 2 pages": {"data_page_version": "2.0", "use_dictionary": False},
    "uncompressed": {"compression": "none", "data_page_version": "2.0"},
    "many pages": {"data_page_size": 1000, "write_batch_size": 8, "use_dictionary": False},
    "deltas": {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    "checksums and index": {"write_page_checksum": True, "write_page_index": True},
    "old": {"version": "1.0", "compression": "gzip", "store_schema": False},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_largest_page_is_found(name, tmp_path):
    """Compared with what all pages of the column, unpacked, come to."""
    texts = [f"{n * n} {'x' * (n % 300 + 1)}" for n in range(2000)]
    meta = [{"text": "in vain"}] * len(texts)
    table = pyarrow.table({"meta": meta, "text": texts, "after": texts})
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, file, row_group_size=700, **WRITTEN[name])
    metadata = pyarrow.parquet.ParquetFile(file).metadata
    with open(file, "rb") as stream:
        groups = list(parquet._chunks(stream, "text"))
        assert len(groups) == metadata.num_row_groups == 3
        for number, ((begin, end),) in enumerate(groups):
            largest = parquet._largest_page(stream, begin, end)
            whole = metadata.row_group(number).column(1).total_uncompressed_size  # with headers
            if name == "many pages":
                assert 1000 <= largest <= 1000 + 8 * 320
            else:
                assert 0.9 * whole < largest < whole
    assert read(file) == [[text] for text in texts]


@pytest.mark.parametrize("categories", [False, True])
def test_a_row_of_any_length_costs_itself_only(tmp_path, categories):
    texts = pyarrow.array(["good", "x" * (reader.RECORD_BYTES + 1), "last"])
    table = pyarrow.table({"text": texts.dictionary_encode() if categories else texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    skipped = Skipped()
    assert read(tmp_path / "a.parquet", skipped=skipped) == GOOD
    assert "".join(skipped.to_jsonl(tmp_path)).count("row 2") == 1
