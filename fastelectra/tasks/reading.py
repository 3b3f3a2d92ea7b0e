"""Reads the official GLUE files with their quirks, the same as JSONL and Parquet, and the hub's.

The official TSV files quote nothing: a quotation mark is text. Columns are found by their names,
of which train and dev of CoLA have none. Some rows of QQP lack columns. MRPC comes as GLUE's own
files, or as Microsoft's, of which dev_ids.tsv tells the dev set.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fastelectra.errors import FastElectraError
from fastelectra.tasks.table import TASKS, Task, plain

HUB = "hub"  # --data
# the last is the hub's
ENDINGS = (".tsv", ".csv", ".txt", ".jsonl", ".parquet", "-00000-of-00001.parquet")
IDS = ("index", "id", "idx")  # columns that number the examples
UNSETTLED = "-"  # a label in MNLI on which annotators did not agree: the example is left out

Record = dict[str, object]


@dataclass(frozen=True)
class Split:
    """The examples of one file."""

    texts: list[tuple[str, ...]]  # one or two each
    labels: list[float] | None  # numbers of classes, or values; None: there are none
    ids: list[str]
    left_out: str = ""  # a warning, if rows were


def read_task(task: Task, data: str) -> tuple[Task, dict[str, Split]]:
    """All splits that are there, and the task (with its labels, if they were not known).

    `data`: a folder, that of all tasks or the task's own, or "hub".
    Raises FastElectraError for what is missing or malformed.
    """
    sources = _hub_sources(task) if data == HUB else _file_sources(task, Path(data))
    needed = ("test",) if task.uses else ("train", "dev")
    for split in needed:
        if split not in sources:
            names = " or ".join(f"{name}.tsv" for name in task.splits[split])
            raise FastElectraError(
                f"{data} has no {split} set of {task.name}: expected {names} (or one .csv,"
                " .jsonl or .parquet)" + (f", or in a folder {task.folder}" if task.folder else "")
            )
    if task.name == "custom":
        task = _with_labels(task, *sources["train"]())
    return task, {split: _read(task, split, *source()) for split, source in sources.items()}


def has_task(task: Task, data: str) -> bool:
    """Whether a folder of all tasks has this one."""
    return data == HUB or _own_folder(task, Path(data)) is not None


def _own_folder(task: Task, data: Path) -> Path | None:
    """The task's folder in that of all tasks; case and dashes do not matter."""
    if not data.is_dir():
        problem = "is a file: name its folder" if data.is_file() else "no such folder"
        raise FastElectraError(f"--data {data}: {problem}")
    wanted = {plain(name) for name in (task.folder, task.hub) if name}
    wanted |= {"diagnostic"} if task.name == "ax" else set()
    found = (path for path in sorted(data.iterdir()) if path.is_dir())
    return next((path for path in found if plain(path.name) in wanted), None)


# --- sources: (where, names of the columns, records) ----------------------------------------------


def _file_sources(task: Task, data: Path) -> dict:
    """For each split whose file is there, a function that opens it."""
    folder, sources = _own_folder(task, data) or data, {}
    for split, stems in task.splits.items():
        paths = [folder / f"{stem}{ending}" for stem in stems for ending in ENDINGS]
        path = next((path for path in paths if path.is_file()), None)
        if path:
            sources[split] = lambda path=path: _open(task, path)
    microsoft = folder / "msr_paraphrase_train.txt"
    if task.name == "mrpc" and "train" not in sources and microsoft.is_file():
        for split in {"train", "dev"} - sources.keys():
            sources[split] = lambda split=split: _microsoft(task, microsoft, split)
    return sources


def _open(task: Task, path: Path) -> tuple[str, list[str], Iterator[Record]]:
    try:
        readers = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
        tabbed = _csv if task.name == "custom" else _tsv
        names, records = readers.get(path.suffix, tabbed)(task, path)
    except UnicodeDecodeError:
        raise FastElectraError(f"{path} is not UTF-8 text") from None
    return str(path), names, records


def _tsv(task: Task, path: Path) -> tuple[list[str], Iterator[Record]]:
    text = path.read_bytes().decode("utf-8-sig")
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    rows = [line.split("\t") for line in lines if line]
    if not rows:
        raise FastElectraError(f"{path} is empty")
    names = rows[0]
    given = dict(zip(task.columns, names, strict=False))
    if given.get("label") in task.labels:  # no header
        names = list(task.columns)
    else:
        del rows[0]
    return names, (dict(zip(names, row, strict=False)) for row in rows)


def _csv(task: Task, path: Path) -> tuple[list[str], Iterator[Record]]:
    """With quotation marks, unlike the official TSV files."""
    csv.field_size_limit(2**31 - 1)  # else 131 072 characters
    delimiter, separators = (",", "commas") if path.suffix == ".csv" else ("\t", "tabs")
    file = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
    lines, records = csv.reader(file, delimiter=delimiter, strict=True), []
    try:
        rows = filter(None, lines)  # but blank lines
        names = next(rows, [])
        for row in rows:
            if delimiter == "\t" and any(
                _swallows(field, place, len(names) - 1) for place, field in enumerate(row)
            ):
                raise csv.Error(
                    "up to here all is one text, between two quotation marks (if that is meant, use"
                    " .jsonl)"
                )
            if len(row) > len(names):
                raise csv.Error("more fields than the header has")
            records.append(dict(zip(names, row, strict=False)))
    except csv.Error as error:
        raise FastElectraError(
            f"{path}, line {lines.line_num}: {error}; quote texts with {separators} or quotation"
            " marks, and double those marks"
        ) from None
    if not records:
        raise FastElectraError(f"{path} is empty")
    return names, iter(records)


def _swallows(field: str, place: int, last: int) -> bool:
    """Whether a field, the place-th of 0 … last, is ends of two rows and whole ones between them.

    A quotation mark that begins a text and was not meant to makes such a field.
    """
    first, *rows = [row for row in field.split("\n") if row.strip("\r")] or [""]
    tabs = [row.count("\t") for row in rows]
    between = [last] * max(1, len(tabs) - 1)
    return last > 0 and first.count("\t") == last - place and tabs == [*between, place]


def _jsonl(task: Task, path: Path) -> tuple[list[str], Iterator[Record]]:
    records = []
    for number, line in enumerate(path.read_bytes().decode("utf-8-sig").split("\n"), 1):
        try:
            record = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            record = ()
        if record is not None and not isinstance(record, dict):
            raise FastElectraError(f"{path}, line {number}: not a JSON object")
        if record is not None:
            records.append(record)
    if not records:
        raise FastElectraError(f"{path} is empty")
    return list(dict.fromkeys(name for record in records for name in record)), iter(records)


def _parquet(task: Task, path: Path) -> tuple[list[str], Iterator[Record]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise FastElectraError(
            f"{path}: reading it needs pyarrow: pip install 'fastelectra[data]'"
        ) from None
    wanted = {name for column in (*task.texts, task.label, IDS) for name in column}
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        records = file.read([name for name in names if name in wanted]).to_pylist()
    except UnicodeDecodeError:
        raise
    except (pyarrow.ArrowException, OSError, OverflowError, ValueError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise FastElectraError(f"cannot read {path}: {reason}") from None
    return names, iter(records)


def _microsoft(task: Task, path: Path, split: str) -> tuple[str, list[str], Iterator[Record]]:
    """GLUE's train or dev set out of Microsoft's train set."""
    chosen = path.with_name("dev_ids.tsv")
    if not chosen.is_file():
        raise FastElectraError(
            f"{path}: GLUE's dev set is a part of it that {chosen.name} lists; put that file beside"
            " it (from https://dl.fbaipublicfiles.com/glue/data/mrpc_dev_ids.tsv)"
        )
    lines = chosen.read_bytes().decode("utf-8-sig", "replace").split("\n")
    dev = {tuple(line.split()) for line in lines}
    where, names, records = _open(task, path)
    belongs = (lambda pair: pair in dev) if split == "dev" else (lambda pair: pair not in dev)
    return where, names, (r for r in records if belongs((r.get("#1 ID"), r.get("#2 ID"))))


def _hub_sources(task: Task) -> dict:
    if not task.hub:
        raise FastElectraError(f"--data hub has the tasks of GLUE, not {task.name}: name a folder")
    try:
        import datasets
    except ImportError:
        raise FastElectraError(
            "--data hub needs datasets: pip install 'fastelectra[data]', or name a folder"
        ) from None
    try:
        loaded = datasets.load_dataset("nyu-mll/glue", task.hub)
    except Exception as error:  # of many kinds: no network, not in the cache, no room …
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise FastElectraError(
            f"--data hub: cannot fetch nyu-mll/glue {task.hub}: {reason}"
        ) from None
    sources = {}
    for split, names in task.splits.items():
        name = next((name for name in names if name in loaded), None)
        if name:
            found = loaded[name]
            sources[split] = lambda found=found, name=name: (
                f"nyu-mll/glue {task.hub} {name}", found.column_names, iter(found)
            )  # fmt: skip
    return sources


# --- examples -------------------------------------------------------------------------------------


def _read(
    task: Task, split: str, where: str, names: Iterable[str], records: Iterator[Record]
) -> Split:
    """The examples of a split. Rows that lack a column are left out, but of a test set."""
    names = list(names)
    texts = [_column(where, names, wanted) for wanted in task.texts]
    testing = split.startswith("test")
    label = _column(where, names, task.label, required=not testing)
    number = next((name for name in IDS if name in names), None)
    found, labels, ids, short = [], [], [], []
    for place, record in enumerate(records):
        value = None if label is None else record.get(label)
        value = _text(value) if isinstance(value, bytes) else value
        lacking = any(record.get(name) is None for name in texts)
        if not testing and (lacking or _is_none(task, value)):
            short.append(place)
            continue
        for name in filter(None, (*texts, label)):
            if isinstance(record.get(name), list | dict):
                raise FastElectraError(
                    f"{where}, example {place + 1:,}: column {name} is not text or a number but a"
                    f" {type(record[name]).__name__}"
                )
        found.append(tuple(_text(record.get(name)) for name in texts))
        labels.append(value)
        name = place if number is None else record.get(number, place)
        ids.append(" ".join(_text(name).split()))  # predictions are lines with tabs
    if not found:
        raise FastElectraError(f"{where} has no examples")
    hidden = testing and all(
        _is_none(task, value) or (value in (-1, "-1") and task.name != "custom") for value in labels
    )
    numbers = None if hidden else [_number(task, value, where, i) for i, value in enumerate(labels)]
    left_out = short and (
        f"warning: {where}: left out {len(short):,} of {len(short) + len(found):,} rows, which lack"
        f" a column or a label, the first is example {short[0] + 1:,}"
    )
    return Split(found, numbers, ids, left_out or "")


def _column(where: str, names: list[str], wanted: tuple[str, ...], required: bool = True):
    found = next((name for name in wanted if name in names), None)
    if found is None and required:
        raise FastElectraError(
            f"{where} has no column {' or '.join(wanted)}; there is {', '.join(names[:12])}"
        )
    return found


def _is_none(task: Task, value: object) -> bool:
    """Whether it is no label. The word NaN is none unless it is one of the classes."""
    if isinstance(value, str):
        unsettled = value == UNSETTLED and task.name != "custom"
        return not value or unsettled or (_is_nan(value) and value not in task.labels)
    return value is None or _is_nan(value)


def _is_nan(value: object) -> bool:
    return str(value).lower() == "nan"


def _text(value: object) -> str:
    """Nothing is an empty text; what is no Unicode becomes question marks."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


def _number(task: Task, value: object, where: str, place: int) -> float:
    """A label as a number: the class by its name or, in GLUE, its number; or value / scale."""
    text = _text(value)
    try:
        if text in task.labels:
            return task.labels.index(text)
        number = float(text)
        if not task.labels and math.isfinite(number):
            return number / task.scale
        if task.name != "custom" and number in range(len(task.labels)):
            return int(number)
    except ValueError:
        pass
    expected = f"one of {', '.join(task.labels[:8])}" if task.labels else "a number"
    raise FastElectraError(f"{where}, example {place + 1:,}: the label {text!r} is not {expected}")


def _with_labels(task: Task, where: str, names: Iterable[str], records: Iterator[Record]) -> Task:
    """A custom task with what its training labels say: classes, or numbers with a fraction."""
    column = _column(where, list(names), task.label)
    found = (r.get(column) for r in records)
    values = {_text(v) for v in found if not (type(v) is float and math.isnan(v))} - {""}
    sound = {value for value in values if not _is_nan(value)}
    try:
        numbers = [float(value) for value in sound]
        values = sound or values  # beside numbers the word NaN is none either
    except ValueError:
        numbers = []
    if numbers and all(map(math.isfinite, numbers)) and any(value % 1 for value in numbers):
        scale = max(map(abs, numbers))
        return replace(task, labels=(), scale=scale, metrics=TASKS["sts-b"].metrics)
    if len(values) < 2:
        raise FastElectraError(f"{where}: column {column} has not two different labels")
    labels = sorted(values, key=(lambda v: (float(v), v)) if numbers else None)
    return replace(task, labels=tuple(labels), metrics=("accuracy", "matthews"))
