"""A task's runs, one a seed, and what is left of them on disk.

    OUT/results.json        scores of each seed, median and spread, settings
    OUT/seed-0/             result.json, predictions for each set (dev.tsv, test.tsv …)
    OUT/model/              the seed with the best dev score, for Hugging Face
    OUT/submission/         its predictions for the GLUE server
    OUT/finetune.lock       says that the folder is of this command

(`fastelectra glue` has all but the last for each task, in OUT/TASK/.)

A finished seed is not run again by the same command. Several processes share the seeds.
"""

import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from tokenizers import Tokenizer

from fastelectra.data import vocabulary
from fastelectra.data.shards import write_durably
from fastelectra.errors import FastElectraError
from fastelectra.tasks import metrics, packing, pretrained, reading
from fastelectra.tasks.loop import Settings, predict, train
from fastelectra.tasks.pretrained import MODEL, PretrainedEncoder
from fastelectra.tasks.reading import Split
from fastelectra.tasks.table import MAX_LENGTH, Task, recipe_of
from fastelectra.training import checkpoint, launch
from fastelectra.training.launch import Process

RESULT, RESULTS = "result.json", "results.json"
LOCK = "finetune.lock"
# a folder without a lock that has one of these is another's
FILES = (RESULTS, MODEL, "submission", "test.tsv", "checkpoints")
SHORTEST = 4  # tokens of an example: a token between [CLS], [SEP] and a second [SEP]


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    model: str
    data: str
    submission: Path  # folder for the GLUE server's files
    seeds: int
    lr: float | None
    epochs: int | None
    layer_decay: str  # google | plain
    max_length: int | None

    def length(self, positions: int) -> int:
        """Of an example at most, for a model with so many positions. Raises FastElectraError."""
        if self.max_length and not SHORTEST <= self.max_length <= positions:
            raise FastElectraError(
                f"--max-length {self.max_length}: the model takes {SHORTEST} to {positions} tokens"
            )
        return self.max_length or min(MAX_LENGTH, positions)


class Runs:
    """All seeds of one task."""

    def __init__(
        self,
        task: Task,
        start: PretrainedEncoder,
        options: Options,
        out: Path,
        device: torch.device,
    ):
        self.start = replace(start, head=None)  # what it was tuned for before had another head
        self.options, self.out, self.device = options, out, device
        self.task, self.splits = reading.read_task(task, options.data)
        if start.folder.resolve() == (out / MODEL).resolve():
            raise FastElectraError(
                f"--model {start.folder} is what --out {out} replaces: name another --out"
            )
        outputs = len(self.task.labels) or 1
        if outputs > pretrained.most_outputs(start.model):
            raise FastElectraError(
                f"{task.name} has {outputs} labels; with a hidden size of {start.model.hidden_size}"
                f" a model can have {pretrained.most_outputs(start.model)}"
            )
        recipe = recipe_of(start.model.hidden_size)
        self.settings = Settings(
            size=recipe.size,
            lr=options.lr or recipe.lr,
            layer_decay=recipe.layer_decay,
            decay_convention=options.layer_decay,
            epochs=options.epochs or task.epochs,
            max_length=options.length(start.model.max_positions),
            precision="bf16" if launch.fast_at_bf16(device) else "fp32",
        )
        self.identity = {
            "task": task.name,
            "labels": list(self.task.labels),
            "settings": asdict(self.settings),
            "weights": _fingerprint(start),
            "tokenizer": _fingerprint_of_tokenizer(start.tokenizer),
            "data": {name: _fingerprint_of_split(split) for name, split in self.splits.items()},
        }

    @cached_property
    def examples(self) -> dict[str, list[packing.Example]]:
        """Of each split; those for training twice, the second time swapped, if that is the task."""
        texts = {name: split.texts for name, split in self.splits.items()}
        if self._doubled:
            texts["train"] = texts["train"] + [(b, a) for a, b in texts["train"]]
        encoder = vocabulary.line_encoder(self.start.tokenizer)
        return {
            name: packing.encode(encoder, self.start.special, pairs, self.settings.max_length)
            for name, pairs in texts.items()
        }

    @property
    def seeds(self) -> list[int]:
        """Those asked for, and those of earlier commands."""
        found = (re.fullmatch(r"seed-(\d+)", path.name) for path in self.out.glob("seed-*"))
        return sorted({*range(self.options.seeds), *(int(match[1]) for match in found if match)})

    def is_done(self, seed: int) -> bool:
        """Whether this seed was run before. FastElectraError if it was, with other settings."""
        path = self._folder(seed) / RESULT
        if not path.parent.exists():
            return False
        found = pretrained.read_json(path) if path.is_file() else {}
        if "scores" not in found:
            raise FastElectraError(f"{path.parent} has no whole {RESULT}: remove that folder")
        if not (path.parent / MODEL).is_dir() and not (self.out / MODEL).is_dir():
            raise FastElectraError(
                f"{self.out / MODEL} is gone: remove {path.parent} to train it again"
            )
        for key, value in self.identity.items():
            if found.get(key) != value:
                raise FastElectraError(
                    f"{path.parent} was made with {_difference(key, found.get(key), value)}: name"
                    " another --out, or remove that folder"
                )
        return True

    def run(self, seed: int, say) -> None:
        """Fine-tune, predict, and write the seed's folder: whole or not at all."""
        began = time.monotonic()
        classifier = self.start.classifier(len(self.task.labels) or 1, seed).to(self.device)
        labels = self.splits["train"].labels * (2 if self._doubled else 1)
        length = self.settings.max_length
        given = [example for name, split in self.splits.items()
                 for example in self.examples[name][: len(split.texts)]]  # fmt: skip
        if cut := sum(example.cut for example in given):
            say(f"{cut:,} of {len(given):,} examples are longer than {length} tokens and were cut")
        weights = train(classifier, self.examples["train"], labels, self.settings, seed, say)
        scores = {}
        target = self._folder(seed)
        with checkpoint.reported(target), checkpoint.write_folder(target) as folder:
            for name, split in self.splits.items():
                if name != "train":
                    outputs = predict(weights.model, self.examples[name], length)
                    if split.labels is not None:
                        scores[name] = metrics.score(self.task, outputs, split.labels)
                    write_predictions(folder / f"{name}.tsv", self.task, split, outputs)
            pretrained.write(folder / MODEL, classifier, self.start, self.task, length)
            result = {**self.identity, "seed": seed, "scores": scores,
                      "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
            write_durably(folder / RESULT, [json.dumps(result, indent=2), "\n"])
        say(f"{_percent(scores['dev'])}  in {result['seconds']:.0f} s")

    def finish(self) -> dict:
        """Sum up all seeds, keep the best model, write the submission; returns results.json."""
        found = [pretrained.read_json(self._folder(seed) / RESULT) for seed in self.seeds]
        metric = self.task.metrics[0]
        best = max(found, key=lambda run: run["scores"]["dev"][metric])["seed"]
        kept = self._folder(best) / MODEL
        if kept.is_dir():  # else it was moved by an earlier command
            shutil.rmtree(self.out / MODEL, ignore_errors=True)
            kept.rename(self.out / MODEL)
        for run in found:
            shutil.rmtree(self._folder(run["seed"]) / MODEL, ignore_errors=True)
        write_submission(self.options.submission, self.task, self._folder(best), self.splits)
        results = {
            **self.identity,
            "metric": metric,
            "model": self.options.model,
            "data_folder": self.options.data,
            "examples": {name: len(split.texts) for name, split in self.splits.items()},
            "runs": [{"seed": run["seed"], **run["scores"], "seconds": run["seconds"]}
                     for run in found],
            **metrics.summarize([run["scores"] for run in found]),
            "best_seed": best,
        }  # fmt: skip
        write_durably(self.out / RESULTS, [json.dumps(results, indent=2), "\n"])
        return results

    def _folder(self, seed: int) -> Path:
        return self.out / f"seed-{seed}"

    @property
    def _doubled(self) -> bool:
        return self.task.symmetric and len(self.task.texts) == 2


def predict_with(task: Task, start: PretrainedEncoder, options: Options, out: Path, device) -> None:
    """A task without training data (AX): predictions of a fine-tuned model, and a submission."""
    task, splits = reading.read_task(task, options.data)
    names = pretrained.class_names(start.folder) if start.head else ()
    if set(names) != set(task.labels):
        raise FastElectraError(
            f"--task {task.name} is predicted with the model of {task.uses}: --model is to name"
            f" what `fastelectra finetune --task {task.uses}` wrote, not {start.folder}"
        )
    task = replace(task, labels=names)
    length = options.length(start.model.max_positions)
    classifier = start.classifier(len(names), 0).to(device)
    encoder = vocabulary.line_encoder(start.tokenizer)
    examples = packing.encode(encoder, start.special, splits["test"].texts, length)
    outputs = predict(classifier, examples, length)
    write_predictions(out / "test.tsv", task, splits["test"], outputs)
    write_submission(options.submission, task, out, splits)


def write_predictions(path: Path, task: Task, split: Split, outputs: np.ndarray) -> None:
    """index, prediction and, where it is known, label."""
    predicted = [_word(task, value) for value in metrics.decide(task, outputs)]
    lines = ["index\tprediction" + ("" if split.labels is None else "\tlabel")]
    for place, (number, word) in enumerate(zip(split.ids, predicted, strict=True)):
        known = "" if split.labels is None else f"\t{_word(task, split.labels[place])}"
        lines.append(f"{number}\t{word}{known}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _word(task: Task, value: float) -> str:
    if task.labels:
        return " ".join(task.labels[int(value)].split())
    return f"{float(value) * task.scale:.5g}"


def write_submission(folder: Path, task: Task, predictions: Path, splits: dict[str, Split]) -> None:
    """The server's files: index and prediction; scores of STS-B within 0 and 5."""
    for split, name in task.submission.items():
        if split not in splits:
            continue
        lines = ["index\tprediction"]
        for line in (predictions / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]:
            number, word, *_ = line.split("\t")
            if not task.labels:
                word = f"{min(task.scale, max(0.0, float(word))):.3f}"
            lines.append(f"{number}\t{word}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _percent(scores: dict[str, float]) -> str:
    return "  ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())


def _fingerprint(start: PretrainedEncoder) -> str:
    """Of the weights, and of what changes a model without being seen in them."""
    model = start.model
    crc = crc32(repr((model.heads, model.dropout, model.attention_dropout)).encode())
    for name in sorted(start.weights):
        crc = crc32(start.weights[name].contiguous().numpy(), crc)
    return f"{crc:08x}"


def _fingerprint_of_tokenizer(tokenizer: Tokenizer) -> str:
    """Of its entries, and of what it makes of capitals and accents."""
    entries = sorted(tokenizer.get_vocab().items())
    ids = tokenizer.encode("An É, an e and an é", add_special_tokens=False).ids
    return f"{crc32(repr((entries, ids)).encode('utf-8', 'replace')):08x}"


def _fingerprint_of_split(split: Split) -> str:
    return f"{crc32(repr((split.texts, split.labels)).encode('utf-8', 'replace')):08x}"


def _difference(key: str, before, now) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                return f"{key}.{name} = {before.get(name)}, now it is {now.get(name)}"
    return f"{key} = {before}, now it is {now}"


def run_all(tasks: Sequence[Runs], process: Process) -> None:
    """Run what is not done yet; processes take turns, and wait for each other at the end."""
    jobs = [(runs, seed) for runs in tasks for seed in runs.seeds]
    done = [(runs, seed) for runs, seed in jobs if runs.is_done(seed)]  # before any is run
    for runs, seed in done:
        process.say(f"{runs.task.name} seed {seed}  done before")
    if process.world > 1:
        torch.distributed.barrier()  # all have seen the same
    for runs, seed in [job for job in jobs if job not in done][process.rank :: process.world]:

        def say(text: str, title: str = f"{runs.task.name} seed {seed}") -> None:
            sys.stdout.write(f"{title}  {text}\n")  # at once: lines of other processes come between
            sys.stdout.flush()

        runs.run(seed, say)
    if process.world > 1:
        torch.distributed.barrier()
