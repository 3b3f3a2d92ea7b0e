"""The objectives of the paper's section 3.4 at equal compute, fine-tuned on STS-B: its figure.

    python bench/objectives.py [--gpu] [--large TEXT…] [--out bench/results/NAME]

Each objective trains the same model from the same seed on the same batches, with the same schedule,
for as many steps as cost the same FLOPs (MFU's count of `fastelectra flops`, which has every layer
in full; the paper's is recorded too). Checkpoints on the way, and the untrained weights, are
fine-tuned with `fastelectra finetune` from several seeds each. On a CPU every core has a run of its
own. The same command goes on where it was stopped; WORK/logs has what every run printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import stsb
from measure import provenance
from options import ROOT

from fastelectra import errors
from fastelectra.config import OBJECTIVES, Config, config_from_dict, load_config
from fastelectra.data.shards import open_corpus
from fastelectra.errors import FastElectraError
from fastelectra.model import Electra
from fastelectra.tasks.finetune import positive
from fastelectra.training import checkpoint
from fastelectra.training.flops import flops_per_token, paper_flops_per_token

SCRATCH = "from scratch"
COLORS = {"electra": "#2563eb", "electra_15": "#7c3aed", "replace_mlm": "#059669",
          "all_tokens_mlm": "#d97706", "mlm": "#dc2626"}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One size of the experiment."""

    config: str  # of configs/
    changes: tuple[str, ...]  # to it, as --set takes them
    vocab_size: int  # of --large
    tokens: int  # that electra sees; the others as many as cost the same
    points: int  # checkpoints of a run that are fine-tuned, evenly spread
    seeds: int  # of fine-tuning
    lr: float
    epochs: int


# STS-B is mostly about tokens in common. At the demo's length of 32 few tokens come twice, and the
# networks do not learn to see that they do; at 128 they begin to.
CPU = Setting(
    "demo",
    ("data.max_length=128", "model.max_positions=128", "training.micro_batch_tokens=2048",
     "data.mask_fraction=0.15", "optimizer.warmup_steps=100"),
    vocab_size=4096, tokens=9_216_000, points=2, seeds=3, lr=1e-3, epochs=5,
)  # fmt: skip
GPU = Setting(
    "small", (), vocab_size=30_522, tokens=100_000 * 128 * 128, points=5, seeds=5, lr=3e-4,
    epochs=10,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run what has not been run yet; write JSON and picture; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--gpu", action="store_true", help="ELECTRA-small on one GPU, for hours")
    add("--large", nargs="+", metavar="TEXT", help="train on these instead of the demo's text")
    add("--work", default="runs/objectives", metavar="DIR", help="checkpoints and logs")
    add("--out", default="runs/objectives/result", metavar="NAME", help="NAME.json and NAME.png")
    add("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES, metavar="NAME")
    add("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="for all runs")
    for name in ("tokens", "points", "seeds", "epochs"):
        add(f"--{name}", type=positive(int), metavar="N", help="default: the setting's")
    add("--lr", type=float, help="of fine-tuning; default: the setting's")
    args = parser.parse_args(argv)
    named = {name: getattr(args, name) for name in ("tokens", "points", "seeds", "epochs", "lr")}
    setting = GPU if args.gpu else CPU
    if not args.gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # where there is a GPU too
    given = {name: value for name, value in named.items() if value is not None}
    changes = (*setting.changes, *args.set)
    setting = Setting(**{**asdict(setting), **given, "changes": changes})
    result = Experiment(setting, Path(args.work), args.large, args.gpu).run(args.objectives)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, Path(f"{out}.png"))
    print("\n".join(lines(result)), f"wrote {out}.json and {out}.png", sep="\n")
    return 0


class Experiment:
    """Its steps, each of which leaves a folder that says that it is done."""

    def __init__(self, setting: Setting, work: Path, texts: list[str] | None, gpu: bool):
        self.setting, self.work, self.texts, self.gpu = setting, work, texts, gpu
        self.workers = 1 if gpu else len(os.sched_getaffinity(0))
        self.corpus_folder, self.task = work / "corpus", work / "STS-B"

    def run(self, objectives: list[str]) -> dict:
        """Everything; returns what was measured."""
        self._check_work()
        began = time.monotonic()
        size = ["--vocab-size", str(self.setting.vocab_size)]
        source = [*self.texts, *size] if self.texts else ["--demo"]
        if not (self.corpus_folder / "manifest.json").is_file():
            self._command("corpus", ["prepare", *source, "--out", str(self.corpus_folder)])
        if not (self.task / "test.tsv").is_file():
            stsb.write(self.task)
        self.corpus = open_corpus(self.corpus_folder)
        configs = {name: self.config(name) for name in objectives}
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                scores = self._scores(configs, pool)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        tokens = sum(len(shard.tokens) for shard in self.corpus.split("train"))
        return {
            "provenance": provenance(),
            "seconds": time.monotonic() - began,  # of this command, not of one it went on with
            "setting": json.loads((self.work / "setting.json").read_text()),
            "corpus": {"tokens": tokens, "vocabulary": self.corpus.vocab_size,
                       "fingerprint": self.corpus.fingerprint},
            "word_overlap": stsb.word_overlap(self.task),
            "from_scratch": scores[SCRATCH],
            "objectives": {name: self._told(name, config, scores)
                           for name, config in configs.items()},
        }  # fmt: skip

    def _scores(self, configs: dict[str, Config], pool: ThreadPoolExecutor) -> dict[str, dict]:
        """Train, and fine-tune every checkpoint; its scores by "objective/step"."""
        trained = {name: pool.submit(self._train, name, config) for name, config in configs.items()}
        tuned = {SCRATCH: pool.submit(self._finetune, SCRATCH, self._untrained())}
        for name, config in configs.items():
            trained[name].result()
            for step in self.steps(config):
                folder = checkpoint.checkpoint_folder(self.work / name, step)
                tuned[f"{name}/{step}"] = pool.submit(self._finetune, f"{name}/{step}", folder)
        return {name: future.result() for name, future in tuned.items()}

    def _check_work(self) -> None:
        """Raises FastElectraError where the folder has runs of another experiment."""
        told = {**asdict(self.setting), "text": self.texts or "demo", "gpu": self.gpu}
        told = json.loads(json.dumps(told))
        file = self.work / "setting.json"
        if file.is_file():
            found = json.loads(file.read_text())
            for name in (name for name in told if told[name] != found.get(name)):
                raise FastElectraError(
                    f"{self.work} has runs with {name} = {found.get(name)}, now it is {told[name]}:"
                    " name another --work"
                )
        self.work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(told) + "\n")

    def config(self, objective: str) -> Config:
        """Of an objective's run: as many steps as cost what electra's cost."""
        file = ROOT / "configs" / f"{self.setting.config}.json"
        fixed = [
            f"data.path={self.corpus_folder}",
            f"training.output_dir={self.work / objective}",
            f"training.keep_last={self.setting.points + 1}",
            "training.tensorboard=false",
        ]
        config = load_config(file, [*self.setting.changes, *fixed])
        budget = self.setting.tokens * flops_per_token(config, self.corpus.vocab_size)
        config.objective.name = objective
        a_step = config.training.batch_tokens * flops_per_token(config, self.corpus.vocab_size)
        between = max(1, round(budget / a_step / self.setting.points))
        config.training.steps = between * self.setting.points
        config.training.checkpoint_every = config.training.eval_every = between
        return config_from_dict(config.to_dict())

    def steps(self, config: Config) -> list[int]:
        """Of the checkpoints that are fine-tuned."""
        every = config.training.checkpoint_every
        return list(range(every, config.training.steps + 1, every))

    def _train(self, name: str, config: Config) -> None:
        last = checkpoint.checkpoint_folder(self.work / name, config.training.steps)
        if last.is_dir():
            return
        file = self.work / f"{name}.json"
        file.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        print(f"training {name}: {config.training.steps:,} steps", flush=True)
        self._command(name, ["train", "--config", str(file)])

    def _untrained(self) -> Path:
        """A checkpoint of the weights that electra's run begins with."""
        import torch

        folder, config = self.work / "untrained", self.config("electra")
        if not folder.is_dir():
            torch.manual_seed(config.training.seed)
            electra = Electra(config.model, self.corpus.vocab_size, config.objective)
            weights = {name: value.detach() for name, value in electra.named_parameters()}
            checkpoint.write_checkpoint(
                folder, weights, self.corpus.tokenizer_dir, step=0, position=None,
                config=config.to_dict(), vocab_size=self.corpus.vocab_size,
                special_tokens=asdict(self.corpus.special), fingerprint=self.corpus.fingerprint,
            )  # fmt: skip
        return folder

    def _finetune(self, name: str, model: Path) -> dict:
        out, setting = self.work / "finetuned" / name.replace("/", "-"), self.setting
        self._command(f"finetuned-{name.replace('/', '-')}", [
            "finetune", "--model", str(model), "--task", "sts-b", "--data", str(self.task),
            "--out", str(out), "--seeds", str(setting.seeds), "--lr", str(setting.lr),
            "--epochs", str(setting.epochs),
        ])  # fmt: skip
        runs = json.loads((out / "results.json").read_text())["runs"]
        scores = {split: [run[split]["spearman"] for run in runs] for split in ("dev", "test")}
        median = {split: statistics.median(values) for split, values in scores.items()}
        print(f"{name}: dev {median['dev']:.3f}, test {median['test']:.3f}", flush=True)
        return {"spearman": scores, "median": median, "seconds": [run["seconds"] for run in runs]}

    def _told(self, name: str, config: Config, scores: dict) -> dict:
        """What became of an objective."""
        vocab_size, tokens = self.corpus.vocab_size, config.training.batch_tokens
        flop, paper = (count(config, vocab_size) for count in (flops_per_token,
                                                               paper_flops_per_token))  # fmt: skip
        records = (self.work / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in records]
        trained = [record for record in records if record["kind"] == "train"]
        heldout = {record["step"]: record for record in records if record["kind"] == "eval"}
        return {
            "flop_per_token": flop, "paper_flop_per_token": paper,
            "tokens": config.training.steps * tokens,
            "seconds": sum(record["tokens"] / record["tokens_per_second"] for record in trained),
            "points": [
                {"step": step, "flop": step * tokens * flop, "paper_flop": step * tokens * paper,
                 "heldout": heldout[step], **scores[f"{name}/{step}"]}
                for step in self.steps(config)
            ],
        }  # fmt: skip

    def _command(self, name: str, arguments: list[str]) -> None:
        self._run(name, [sys.executable, "-m", "fastelectra.cli", *arguments])

    def _run(self, name: str, command: list[str]) -> None:
        """Run a command, what it prints going to its log."""
        folder = self.work / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **({} if self.gpu else {"OMP_NUM_THREADS": "1"})}
        with open(folder / f"{name}.log", "a") as log:
            done = subprocess.run(command, stdout=log, stderr=log, check=False, env=environment)
        if done.returncode:
            raise FastElectraError(f"{name} failed: see {log.name}")


def lines(result: dict) -> list[str]:
    """The table for a terminal: the last point of each curve, and what to compare it with."""

    def row(name: str, spearman: dict, told: str) -> str:
        low, high = min(spearman["dev"]), max(spearman["dev"])
        dev, test = (statistics.median(spearman[split]) for split in ("dev", "test"))
        return f"{name:16s}{dev:8.3f}  ({low:.3f}–{high:.3f}){test:8.3f}{told}"

    text = [f"{'Spearman, STS-B':16s}{'dev':>8s}{'':17s}{'test':>8s}{'tokens':>12s}{'FLOP':>11s}"]
    for name, told in result["objectives"].items():
        last = told["points"][-1]
        text.append(
            row(
                name,
                last["spearman"],
                f"{told['tokens']:12,}{last['flop']:11.3g}{told['seconds']:8,.0f} s",
            )
        )
    overlap = result["word_overlap"]
    text.append(row(SCRATCH, result["from_scratch"]["spearman"], ""))
    text.append(f"{'word overlap':16s}{overlap['dev']:8.3f}{'':17s}{overlap['test']:8.3f}")
    return text


def draw(result: dict, path: Path) -> None:
    """The paper's figure: score against compute, a curve an objective, medians and ranges."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    axes = figure.subplots()
    scratch = result["from_scratch"]
    for number, (name, told) in enumerate(result["objectives"].items()):
        points = [{"flop": 0, **scratch}, *told["points"]]
        medians = [point["median"]["dev"] for point in points]
        below = [m - min(p["spearman"]["dev"]) for m, p in zip(medians, points, strict=True)]
        above = [max(p["spearman"]["dev"]) - m for m, p in zip(medians, points, strict=True)]
        shift = 1 + 0.008 * (number - 2)  # so that bars do not hide one another
        axes.errorbar([point["flop"] * shift for point in points], medians, [below, above],
                      marker="o", markersize=4, capsize=2, color=COLORS[name], label=name,
                      linewidth=2, elinewidth=1)  # fmt: skip
    overlap = result["word_overlap"]["dev"]
    for value, label in ((overlap, "word overlap"), (scratch["median"]["dev"], SCRATCH)):
        axes.axhline(value, color="#7b8794", linestyle=(0, (3, 2)), linewidth=1.2)
        axes.text(0.99, value, label, color="#7b8794", fontsize=9, ha="right", va="bottom",
                  transform=axes.get_yaxis_transform())  # fmt: skip
    where, seeds = result["provenance"], result["setting"]["seeds"]
    axes.set_title(f"STS-B dev after pre-training, median and range of {seeds} fine-tuning seeds\n"
                   f"{where['gpu'] or where['cpu']}, {where['time'][:10]}", fontsize=9)  # fmt: skip
    axes.set_xlabel("FLOP of pre-training (matrix products)")
    axes.set_ylabel("Spearman")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb")
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(errors.run(main))
