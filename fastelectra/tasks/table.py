"""The tasks of GLUE (Wang et al. 2019): what is read, predicted, measured and submitted."""

from dataclasses import dataclass, field

from fastelectra.errors import FastElectraError

BATCH = 32  # examples
MAX_LENGTH = 128  # tokens
WARMUP = 0.1  # of the steps
GOOGLE, PLAIN = "google", "plain"  # conventions of layer-wise decay
ABOVE = {GOOGLE: 2, PLAIN: 1}  # powers of the decay between the head and the top layer
SPLITS = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}
ENTAILMENT = ("entailment", "neutral", "contradiction")
PAIR = (("sentence1",), ("sentence2",))


@dataclass(frozen=True)
class Task:
    """One row of the table. Columns are named as in the official files, then as in others."""

    name: str
    folder: str  # in the official archive
    texts: tuple[tuple[str, ...], ...]  # for each text, the names its column may have
    metrics: tuple[str, ...]  # the first is the one that counts
    labels: tuple[str, ...] = ("0", "1")  # in the order of their numbers; none: a number is learnt
    label: tuple[str, ...] = ("label",)  # names that its column may have
    epochs: int = 3
    symmetric: bool = False  # the order of the texts means nothing: both are trained on
    scale: float = 1.0  # numbers are learnt divided by it
    splits: dict[str, tuple[str, ...]] = field(default_factory=lambda: SPLITS)  # → names of files
    columns: tuple[str, ...] = ()  # of official files without a header
    hub: str = ""  # name in the nyu-mll/glue dataset, and of other people's folders
    submission: dict[str, str] = field(default_factory=dict)  # test split → the server's file
    uses: str = ""  # has no training data: the task whose model predicts it


TASKS = {
    task.name: task
    for task in (
        Task("cola", "CoLA", (("sentence",),), ("matthews", "accuracy"), hub="cola",
             columns=("source", "label", "mark", "sentence"), submission={"test": "CoLA"}),
        Task("sst-2", "SST-2", (("sentence",),), ("accuracy",), hub="sst2",
             submission={"test": "SST-2"}),
        Task("mrpc", "MRPC", (("#1 String", "sentence1"), ("#2 String", "sentence2")),
             ("accuracy", "f1"), label=("Quality", "label"), symmetric=True, hub="mrpc",
             splits={**SPLITS, "test": ("test", "msr_paraphrase_test")},
             submission={"test": "MRPC"}),
        Task("sts-b", "STS-B", PAIR, ("spearman", "pearson"), labels=(), label=("score", "label"),
             epochs=10, symmetric=True, scale=5.0, hub="stsb", submission={"test": "STS-B"}),
        Task("qqp", "QQP", (("question1",), ("question2",)), ("accuracy", "f1"),
             label=("is_duplicate", "label"), hub="qqp", submission={"test": "QQP"}),
        Task("mnli", "MNLI", (("sentence1", "premise"), ("sentence2", "hypothesis")),
             ("accuracy",), ENTAILMENT, label=("gold_label", "label"), hub="mnli",
             splits={"train": ("train",),
                     "dev": ("dev_matched", "validation_matched"),
                     "dev_mm": ("dev_mismatched", "validation_mismatched"),
                     "test": ("test_matched",), "test_mm": ("test_mismatched",)},
             submission={"test": "MNLI-m", "test_mm": "MNLI-mm"}),
        Task("qnli", "QNLI", (("question",), ("sentence",)), ("accuracy",), hub="qnli",
             labels=("entailment", "not_entailment"), submission={"test": "QNLI"}),
        Task("rte", "RTE", PAIR, ("accuracy",), hub="rte", epochs=10,
             labels=("entailment", "not_entailment"), submission={"test": "RTE"}),
        Task("wnli", "WNLI", PAIR, ("accuracy",), hub="wnli", submission={"test": "WNLI"}),
        Task("ax", "AX", (("sentence1", "premise"), ("sentence2", "hypothesis")), ("matthews",),
             ENTAILMENT, hub="ax", splits={"test": ("diagnostic", "AX", "test")},
             submission={"test": "AX"}, uses="mnli"),
    )
}  # fmt: skip

# Medians on the dev sets, as the table's metrics: ELECTRA-Small-OWT after 1 M steps, Base++ and
# Large-1.75M of google-research/electra.
PAPER = {
    "small": {"cola": 56.8, "sst-2": 88.3, "mrpc": 87.4, "sts-b": 86.8, "qqp": 88.3, "mnli": 78.9,
              "qnli": 87.9, "rte": 68.5},
    "base": {"cola": 67.7, "sst-2": 95.1, "mrpc": 89.5, "sts-b": 91.2, "qqp": 91.5, "mnli": 88.8,
             "qnli": 93.2, "rte": 82.7},
    "large": {"cola": 69.1, "sst-2": 96.9, "mrpc": 90.8, "sts-b": 92.6, "qqp": 92.4, "mnli": 90.9,
              "qnli": 95.0, "rte": 88.0},
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What fine-tuning takes by the size of the model (paper, table 7)."""

    size: str
    lr: float  # of the head
    layer_decay: float  # of lr, from each layer to the one below


RECIPES = {  # smallest hidden size → recipe
    1024: Recipe("large", 5e-5, 0.9),
    768: Recipe("base", 1e-4, 0.8),
    0: Recipe("small", 3e-4, 0.8),
}


def recipe_of(hidden_size: int) -> Recipe:
    """The recipe of the preset that is not wider than the model; small, if none is."""
    return next(recipe for least, recipe in RECIPES.items() if hidden_size >= least)


def plain(name: str) -> str:
    """A task's name without what differs from place to place: sst-2, SST-2 and sst2 are one."""
    return name.lower().replace("-", "")


def custom(texts: str, label: str) -> Task:
    """The user's own task, from names of columns; its labels come from the training data."""
    names = tuple(name.strip() for name in texts.split(","))
    if not label or not all(names) or len(names) > 2:
        raise FastElectraError(
            f"--text {texts} --label {label}: expected one or two columns, as --text a,b --label c"
        )
    return Task("custom", "", tuple((name,) for name in names), (), label=(label,))
