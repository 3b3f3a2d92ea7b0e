"""Every reader on small files in the official layout, quirks included."""

import csv
import json
import sys
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet

from fastelectra.errors import FastElectraError
from fastelectra.tasks.reading import has_task, read_task
from fastelectra.tasks.table import TASKS, custom

STS = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
PARSES = "sentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
MNLI = f"index\tpromptID\tpairID\tgenre\t{PARSES}\tsentence1\tsentence2"
MICROSOFT = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
OFFICIAL = {  # folder → file → lines
    "CoLA": {
        "train.tsv": ['gj04\t1\t\tThe "box was\u2028opened.', "bc01\t0\t*\tBox the opened."],
        "dev.tsv": ["gj04\t0\t*\tsentence"],
        "test.tsv": ["index\tsentence", "0\tBill left."],
    },
    "SST-2": {
        "train.tsv": ["sentence\tlabel", "hide new secretions \t0", '" gripping\t1'],
        "dev.tsv": ["sentence\tlabel", "a charming film\t1"],
        "test.tsv": ["index\tsentence", "0\tuneasy mishmash"],
    },
    "MRPC": {
        "train.tsv": [MICROSOFT, "1\t70\t71\tHe said.\tHe stated.", "0\t72\t73\tA.\tB."],
        "dev.tsv": [MICROSOFT, "1\t74\t75\tC.\tD."],
        "test.tsv": ["\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t1\t2\tE.\tF."],
    },
    "STS-B": {
        "train.tsv": [f"{STS}\tscore", "0\ta\tb\t2012\t0\tn\tn\tA plane.\tAn air plane.\t3.800"],
        "dev.tsv": [f"{STS}\tscore", "0\ta\tb\t2012\t0\tn\tn\tA man.\tA child.\t0.500"],
        "test.tsv": [STS, "0\ta\tb\t2012\t0\tn\tn\tA girl.\tA boy."],
    },
    "QQP": {
        "train.tsv": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
                      "9\t1\t2\tWhy?\tHow?\t0", "8\t1\t2\tWhy", "7\t3\t4\tWho?\tWhom?\t1"],
        "dev.tsv": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
                    "1\t1\t2\tIs it?\tIt?\t1"],
        "test.tsv": ["id\tquestion1\tquestion2", "0\tWhat?\tWhich?", "1\tcut off"],
    },
    "MNLI": {
        "train.tsv": [f"{MNLI}\tlabel1\tgold_label",
                      "0\t1\t1n\tfic\tp\tp\tp\tp\tYou do.\tYou don't.\tneutral\tcontradiction"],
        "dev_matched.tsv": [
            f"{MNLI}\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label",
            "0\t1\t1n\tfic\tp\tp\tp\tp\tA.\tB.\tneutral\tneutral\tneutral\tneutral\tneutral\tneutral",
            "1\t1\t1n\tfic\tp\tp\tp\tp\tA.\tB.\tneutral\tneutral\tneutral\tneutral\tneutral\t-"],
        "dev_mismatched.tsv": [
            f"{MNLI}\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label",
            "0\t1\t1n\tfic\tp\tp\tp\tp\tC.\tD.\tx\tx\tx\tx\tx\tentailment"],
        "test_matched.tsv": [MNLI, "0\t1\t1n\tfic\tp\tp\tp\tp\tE.\tF."],
        "test_mismatched.tsv": [MNLI, "7\t1\t1n\tfic\tp\tp\tp\tp\tG.\tH."],
    },
    "QNLI": {
        "train.tsv": ["index\tquestion\tsentence\tlabel", "0\tWhen?\tThen.\tnot_entailment"],
        "dev.tsv": ["index\tquestion\tsentence\tlabel", "0\tWhat?\tThat.\tentailment"],
        "test.tsv": ["index\tquestion\tsentence", "0\tWho?\tHe."],
    },
    "RTE": {
        "train.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tNo.\tYes.\tnot_entailment"],
        "dev.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tYes.\tYes.\tentailment"],
        "test.tsv": ["index\tsentence1\tsentence2", "0\tThis.\tThat."],
    },
    "WNLI": {
        "train.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tI put it.\tIt is.\t1"],
        "dev.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tHe did.\tShe did.\t0"],
        "test.tsv": ["index\tsentence1\tsentence2", "0\tMaude.\tDora."],
    },
    "AX": {"AX.tsv": ["index\tsentence1\tsentence2", "0\tThe cat sat.\tThe cat did not sit."]},
}  # fmt: skip
TRAIN = {  # task → texts and labels of its train set
    "cola": ([('The "box was\u2028opened.',), ("Box the opened.",)], [1, 0]),
    "sst-2": ([("hide new secretions ",), ('" gripping',)], [0, 1]),
    "mrpc": ([("He said.", "He stated."), ("A.", "B.")], [1, 0]),
    "sts-b": ([("A plane.", "An air plane.")], [0.76]),
    "qqp": ([("Why?", "How?"), ("Who?", "Whom?")], [0, 1]),
    "mnli": ([("You do.", "You don't.")], [2]),
    "qnli": ([("When?", "Then.")], [1]),
    "rte": ([("No.", "Yes.")], [1]),
    "wnli": ([("I put it.", "It is.")], [1]),
}


@pytest.fixture(params=["\n", "\r\n"], ids=["unix", "dos"])
def official(request, tmp_path):
    """All official folders."""
    for folder, files in OFFICIAL.items():
        (tmp_path / folder).mkdir()
        for name, lines in files.items():
            text = "".join(f"{line}{request.param}" for line in lines)
            (tmp_path / folder / name).write_bytes(text.encode())
    return tmp_path


def test_official_files(official):
    for name, task in TASKS.items():
        assert has_task(task, str(official))
        for place in (official, official / task.folder):
            _, splits = read_task(task, str(place))
            assert set(splits) == set(task.splits)
            if name in TRAIN:
                assert (splits["train"].texts, splits["train"].labels) == TRAIN[name]
            for split, examples in splits.items():
                assert (examples.labels is None) == split.startswith("test")
    _, mnli = read_task(TASKS["mnli"], str(official))
    assert (mnli["dev"].labels, mnli["dev_mm"].labels) == ([1], [0])
    assert mnli["test_mm"].ids == ["7"]
    _, qqp = read_task(TASKS["qqp"], str(official))
    assert "QQP/train.tsv: left out 1 of 3 rows" in qqp["train"].left_out
    assert qqp["test"].left_out == ""
    assert qqp["test"].texts == [("What?", "Which?"), ("cut off", "")]  # none may be missing
    _, cola = read_task(TASKS["cola"], str(official))
    assert cola["dev"].texts == [("sentence",)]
    assert cola["test"].texts == [("Bill left.",)]


def test_microsofts_mrpc(tmp_path):
    rows = [MICROSOFT, "1\t70\t71\tHe said.\tHe stated.", "0\t72\t73\tA.\tB."]
    (tmp_path / "msr_paraphrase_train.txt").write_text("\n".join(rows))
    (tmp_path / "msr_paraphrase_test.txt").write_text(f"{MICROSOFT}\n1\t80\t81\tG.\tH.\n")
    with pytest.raises(FastElectraError, match=r"put that file beside it"):
        read_task(TASKS["mrpc"], str(tmp_path))
    (tmp_path / "dev_ids.tsv").write_text("72\t73\n")
    _, splits = read_task(TASKS["mrpc"], str(tmp_path))
    assert splits["train"].texts == [("He said.", "He stated.")]
    assert (splits["dev"].texts, splits["dev"].labels) == ([("A.", "B.")], [0])
    assert (splits["test"].texts, splits["test"].labels, splits["test"].ids) == (
        [("G.", "H.")], [1], ["0"])  # fmt: skip


RECORDS = {  # as Hugging Face has them
    "train": [{"premise": "A.", "hypothesis": 'B "', "label": 1, "idx": 0}],
    "validation_matched": [{"premise": "C.", "hypothesis": "D.", "label": 2, "idx": 5}],
    "validation_mismatched": [{"premise": "E.", "hypothesis": "F.", "label": 0, "idx": 0}],
    "test_matched": [{"premise": "G.", "hypothesis": "H.", "label": -1, "idx": 3}],
}


def check_records(splits):
    assert set(splits) == {"train", "dev", "dev_mm", "test"}
    assert splits["train"].texts == [("A.", 'B "')]
    assert [splits[name].labels for name in ("train", "dev", "dev_mm")] == [[1], [2], [0]]
    assert (splits["test"].labels, splits["test"].ids) == (None, ["3"])


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet", "-00000-of-00001.parquet"])
def test_other_formats(tmp_path, kind):
    (tmp_path / "mnli").mkdir()
    for name, records in RECORDS.items():
        path = tmp_path / "mnli" / f"{name}{kind}"
        if kind == ".jsonl":
            path.write_text("".join(f"{json.dumps(record)}\n\n" for record in records))
        elif kind == ".csv":
            with open(path, "w", newline="") as file:
                file.write("\n")
                rows = csv.DictWriter(file, list(records[0]))
                rows.writeheader()
                rows.writerows(records)
        else:
            parquet.write_table(pyarrow.Table.from_pylist(records), path)
    check_records(read_task(TASKS["mnli"], str(tmp_path))[1])


def test_the_hub(monkeypatch):
    class Rows(list):
        column_names = ("premise", "hypothesis", "label", "idx")

    def load_dataset(path, name):
        assert (path, name) == ("nyu-mll/glue", "mnli")
        return {split: Rows(records) for split, records in RECORDS.items()}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    check_records(read_task(TASKS["mnli"], "hub")[1])

    def offline(path, name):
        raise ConnectionError("no network\nand more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(FastElectraError, match=r"cannot fetch nyu-mll/glue mnli: no network$"):
        read_task(TASKS["mnli"], "hub")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FastElectraError, match=r"--data hub needs datasets: pip install"):
        read_task(TASKS["mnli"], "hub")


def write_custom(folder, rows):
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("a\tb\tc\n" + "".join(f"{row}\n" for row in rows))


def test_labels_of_a_custom_task(tmp_path):
    write_custom(tmp_path, ["x\ty\t10", "x\ty\t9", "x\ty\t10"])
    task, splits = read_task(custom("a,b", "c"), str(tmp_path))
    assert (task.labels, splits["train"].labels) == (("9", "10"), [1, 0, 1])
    assert task.metrics == ("accuracy", "matthews")
    write_custom(tmp_path, ["x\ty\tgood", "x\ty\tbad"])
    task, splits = read_task(custom("b", "c"), str(tmp_path))
    assert (task.labels, splits["dev"].labels) == (("bad", "good"), [1, 0])
    assert splits["dev"].texts == [("y",), ("y",)]
    write_custom(tmp_path, ["x\ty\t-2.5", "x\ty\t1"])
    task, splits = read_task(custom("a,b", "c"), str(tmp_path))
    assert (task.labels, task.scale, splits["train"].labels) == ((), 2.5, [-1, 0.4])
    assert task.metrics == ("spearman", "pearson")


def test_texts_of_csv_may_be_long_and_quoted(tmp_path):
    long = "a\n" * 100_000
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").write_text(f'text,label\n"{long}",0\n"b, ""c""",1\n')
    splits = read_task(custom("text", "label"), str(tmp_path))[1]
    assert splits["dev"].texts == [(long,), ('b, "c"',)]


def test_custom_tsv_is_quoted_as_csv(tmp_path):
    texts = ['"Yes", he said', "two\nlines\tand a tab", 'a "b" c']
    for name in ("train", "dev"):
        with open(tmp_path / f"{name}.tsv", "w", newline="") as file:
            csv.writer(file, "excel-tab").writerows([("a", "c"), *zip(texts, "xyx", strict=True)])
    task, splits = read_task(custom("a", "c"), str(tmp_path))
    assert (task.labels, splits["train"].texts) == (("x", "y"), [(text,) for text in texts])
    for rows, message in (("b\tmore\ty", "more fields than the header has"),
                          ('"b" c\ty', "'\t' expected after"),
                          ('"b, he said\ty\n\nb\tx\nsaid she"\ty', "up to here all is one"),
                          ('"b\ty\nb\tx\nb\ty\nb"\ty', "up to here all is one")):  # fmt: skip
        (tmp_path / "train.tsv").write_text(f"a\tc\na\tx\n{rows}\n")
        where = rf"train\.tsv, line {3 + rows.count(chr(10))}"
        with pytest.raises(FastElectraError, match=rf"{where}: {message}.*; quote texts"):
            read_task(custom("a", "c"), str(tmp_path))


def test_names_of_columns_may_have_spaces_between_them(tmp_path):
    write_custom(tmp_path, ["x\ty\tp", "x\ty\tq"])
    assert read_task(custom("a, b", "c"), str(tmp_path))[1]["train"].texts[0] == ("x", "y")
    with pytest.raises(FastElectraError, match=r"train\.tsv: is a file: name its folder"):
        read_task(custom("a, b", "c"), str(tmp_path / "train.tsv"))


def test_nan_is_no_number_and_no_label_beside_numbers(tmp_path):
    write_custom(tmp_path, ["x\ty\t1.5", "x\ty\tNaN", "x\ty\t3", "x\ty\tnan"])
    task, splits = read_task(custom("a,b", "c"), str(tmp_path))
    assert (task.labels, splits["train"].labels) == ((), [0.5, 1])
    assert "left out 2 of 4 rows" in splits["train"].left_out
    write_custom(tmp_path, ["x\ty\t1", "x\ty\tNaN", "x\ty\t0"])
    task, splits = read_task(custom("a,b", "c"), str(tmp_path))
    assert (task.labels, splits["dev"].labels) == (("0", "1"), [1, 0])
    write_custom(tmp_path, ["x\ty\troti", "x\ty\tnan"])  # kinds of bread
    task, splits = read_task(custom("a,b", "c"), str(tmp_path))
    assert (task.labels, splits["dev"].labels) == (("nan", "roti"), [1, 0])


def test_names_of_a_custom_task_are_not_numbers(tmp_path):
    write_custom(tmp_path, ["x\ty\t1", "x\ty\t2", "x\ty\t3"])
    for label in ("0", "1.0"):  # not the first class, nor the second
        (tmp_path / "dev.tsv").write_text(f"a\tb\tc\nx\ty\t{label}\n")
        with pytest.raises(FastElectraError, match=f"label '{label}' is not one of 1, 2, 3"):
            read_task(custom("a", "c"), str(tmp_path))
    write_custom(tmp_path, ["x\ty\t+", "x\ty\t-"])  # in MNLI the second is no label
    assert read_task(custom("a", "c"), str(tmp_path))[0].labels == ("+", "-")


def test_odd_values_of_json(tmp_path):
    rows = [
        '{"a": "x", "c": NaN}',
        '{"a": 1, "c": 0.5}',
        '{"a": null, "c": 1}',
        '{"a": "", "c": 1}',
    ]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "test.jsonl").write_text(r'{"a": "\ud800", "id": "n\to\n\ud800"}')
    task, splits = read_task(custom("a", "c"), str(tmp_path))
    assert (task.labels, splits["train"].labels) == ((), [0.5, 1.0])
    assert splits["train"].texts == [("1",), ("",)]
    assert "left out 2 of 4 rows" in splits["train"].left_out
    assert (splits["test"].texts, splits["test"].ids) == ([("?",)], ["n o ?"])
    (tmp_path / "train.jsonl").write_text('{"a": "x", "c": "\\ud800"}\n{"a": "x", "c": "b"}')
    (tmp_path / "dev.jsonl").write_text('{"a": "x", "c": "b"}')
    assert read_task(custom("a", "c"), str(tmp_path))[0].labels == ("?", "b")
    (tmp_path / "dev.jsonl").write_text("\n")
    with pytest.raises(FastElectraError, match=r"dev\.jsonl is empty"):
        read_task(custom("a", "c"), str(tmp_path))


def test_other_columns_of_parquet_do_not_matter_and_bytes_are_text(tmp_path):
    when = pyarrow.array([1700000000000000001, 5], pyarrow.timestamp("ns"))  # Python has no such
    for name in ("train", "dev"):
        table = pyarrow.table({"sentence": [b"a", "é".encode()], "label": [0, 1], "when": when})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    _, splits = read_task(TASKS["sst-2"], str(tmp_path))
    assert splits["train"].texts == [("a",), ("é",)]
    parquet.write_table(
        pyarrow.table({"sentence": ["a", "b"], "label": when}), tmp_path / "dev.parquet"
    )
    with pytest.raises(FastElectraError, match=r"cannot read .*dev\.parquet"):
        read_task(TASKS["sst-2"], str(tmp_path))


def test_lists_are_no_text(tmp_path):
    (tmp_path / "dev.jsonl").write_text('{"a": "x", "c": "b"}')
    (tmp_path / "train.jsonl").write_text('{"a": "x"}\n{"a": "x", "c": "b"}\n{"a": [1], "c": "d"}')
    message = r"train\.jsonl, example 3: column a is not text or a number but a list"
    with pytest.raises(FastElectraError, match=message):
        read_task(custom("a", "c"), str(tmp_path))


def test_a_custom_class_may_be_named_minus_one(tmp_path):
    write_custom(tmp_path, ["x\ty\t-1", "x\ty\t1"])
    (tmp_path / "test.tsv").write_text("a\tb\tc\nx\ty\t-1\n")
    assert read_task(custom("a", "c"), str(tmp_path))[1]["test"].labels == [0]


def test_a_blank_line_is_no_example(tmp_path):
    for name, lines in OFFICIAL["RTE"].items():
        (tmp_path / name).write_bytes("".join(f"{line}\r\n" for line in [*lines, ""]).encode())
    splits = read_task(TASKS["rte"], str(tmp_path))[1]
    assert [len(split.texts) for split in splits.values()] == [1, 1, 1]
    assert splits["train"].left_out == ""


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["index\tsentence1\tlabel", "0\tA.\t1"], "no column sentence2; there is index, sentence1"),
        (["index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tmaybe"],
         "example 1: the label 'maybe' is not one of entailment, not_entailment"),
        (["index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\t2"], "the label '2' is not one of"),
        (["index\tsentence1\tsentence2\tlabel"], "has no examples"),
        ([], "is empty"),
    ],
)  # fmt: skip
def test_malformed_files(tmp_path, lines, message):
    (tmp_path / "train.tsv").write_text("\n".join(lines))
    (tmp_path / "dev.tsv").write_text("\n".join(OFFICIAL["RTE"]["dev.tsv"]))
    with pytest.raises(FastElectraError, match=message) as error:
        read_task(TASKS["rte"], str(tmp_path))
    assert str(tmp_path / "train.tsv") in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.tsv", b"sentence\tlabel\n\xff\xfe\t1\n", "not UTF-8"),
        ("train.jsonl", b'{"sentence": "a", "label": 1}\n[]\n', "line 2: not a JSON object"),
        ("train.jsonl", b'{"sentence": \n', "line 1: not a JSON object"),
        ("train.parquet", b"PAR1", "cannot read"),
        ("train.csv", b'sentence,label\na,1\n"b" c,0\n', "line 3: ',' expected after"),
        ("train.csv", b"\n\nsentence,label\n\na, b,1\n", "line 5: more fields than the header"),
        ("train.csv", b"sentence,label\n", "is empty"),
        ("dev.tsv", b"sentence\tlabel\na\t1\n", r"has no train set of sst-2: expected train\.tsv"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\na\t1\n")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FastElectraError, match=message):
        read_task(TASKS["sst-2"], str(tmp_path))
