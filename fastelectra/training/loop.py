"""The training loop: steps, evaluations, checkpoints, in an order that a restart repeats."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from fastelectra import kernels
from fastelectra.config import Config
from fastelectra.data.batch import Batch
from fastelectra.data.shards import Corpus
from fastelectra.data.stream import BatchStream, Position, prefetch, shape_for
from fastelectra.errors import FastElectraError
from fastelectra.model.electra import Electra
from fastelectra.training import checkpoint, portable
from fastelectra.training.engine import Plan, start_engine
from fastelectra.training.flops import flops_per_token, peak_flops
from fastelectra.training.launch import Process
from fastelectra.training.metrics import Meter, complaints
from fastelectra.training.report import Report
from fastelectra.training.resume import Start, load_moments, load_weights
from fastelectra.training.saver import Saver
from fastelectra.training.stopping import Stop
from fastelectra.training.update import Updater

AHEAD = 4  # steps of batches made before they are needed


class Trainer:
    """A run: model, engine, data and reports, from a start to the last step."""

    def __init__(self, config: Config, corpus: Corpus, process: Process, plan: Plan, start: Start):
        self.config, self.corpus, self.process, self.plan = config, corpus, process, plan
        self.training = config.training
        self.start, self.run = start, Path(config.training.output_dir)
        self.stream, self.heldout = (self._stream(name) for name in ("train", "heldout"))
        self.complaints: set[str] = set()  # made at the last evaluation
        kernels.set_backend(config.training.kernels)
        torch.manual_seed(config.training.seed)
        model = Electra(config.model, corpus.vocab_size, config.objective)
        weights = load_weights(model, start.folder) if start.folder else None
        moments = load_moments(model, start.folder) if start.resumes else None
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.engine = start_engine(model, config, plan)
        self._check_agreement()
        if start.resumes:
            adam_step = portable.torch_optimizer(self.engine).adam_step(start.step - start.skipped)
            portable.restore(self.engine, weights, moments, adam_step, start.loss_scale)
        self.updater = Updater(self.engine, config, plan.device, plan.tells_norm, plan.graphs)
        peak = peak_flops(plan.device, plan.precision)
        self.peak_tokens = peak and peak * process.world / flops_per_token(
            config, corpus.vocab_size
        )

    def _stream(self, split: str) -> BatchStream:
        data, training = self.config.data, self.config.training
        shards, special = self.corpus.split(split), self.corpus.special
        shape = shape_for(shards, data, training.micro_batch_tokens)
        return BatchStream(shards, special, data, shape, training.micro_batches, training.seed)

    def _check_agreement(self) -> None:
        """Ranks that do not see the same run folder would go on from different steps."""
        steps = torch.tensor([self.start.step, -self.start.step], device=self.plan.device)
        torch.distributed.all_reduce(steps, torch.distributed.ReduceOp.MAX)
        if steps.sum():
            raise FastElectraError(
                f"not all processes see the same checkpoints in {self.run}: training.output_dir"
                " must be a folder that all machines share"
            )

    def _check_alone(self) -> None:
        """Now that the folder is locked: another run may have gone on since the start was found."""
        if checkpoint.newest_step(self.run, self.start.damaged) > self.start.step:
            raise FastElectraError(f"another run has gone on in {self.run}: run the command again")

    def train(self, max_hours: float | None = None) -> None:
        """Train to the last step, then evaluate and write the last checkpoint.

        A signal, or `max_hours` since the start, end it after a step with a checkpoint of it.
        """
        self.report = None
        if self.process.leads:
            self._check_alone()
            self.report = Report(self.config, self.start.step)
            for folder in self.start.damaged:
                checkpoint.set_aside(folder)
            checkpoint.tidy(self.run, self.training.keep_last, self.training.keep_every)
        self.saver, stop = Saver(self.training, self.process), Stop(max_hours)
        self.engine.train()
        with stop.listening():
            stopped = self._train(stop)
            self.saver.wait()
        if self.report:
            self.report.close()
            self.process.say(stopped or f"finished; on held-out text\n{self.report.sketch()}")
            if self.report.picture.exists():  # drawn from the first evaluation on
                self.process.say(f"learning curves: {self.report.picture}")
        torch.distributed.destroy_process_group()

    def _train(self, stop: Stop) -> str:
        """The steps; returns why they ended before the last, which is mostly empty."""
        training, first = self.training, self.start.step
        mark = self.began = time.monotonic()
        for step, (batches, position) in zip(
            range(first + 1, training.steps + 1), prefetch(self._steps(), AHEAD), strict=False
        ):
            norm = self.updater.update(step, batches)
            reason = stop.agreed(self.saver.failed)
            last = step == training.steps
            evaluates = last or step % training.eval_every == 0
            saves = last or bool(reason) or step % training.checkpoint_every == 0
            logs = evaluates or saves or step % training.log_every == 0
            if logs:
                self._log(step, norm, mark)
            if evaluates:
                self._evaluate(step)
            if saves:
                self._save(step, position, last, last or bool(reason))
            if reason and not last:
                return f"stopped after step {step:,}: {reason}; the same command goes on"
            if logs:
                mark = time.monotonic()
        return ""

    def _steps(self) -> Iterator[tuple[list[Batch], Position]]:
        """This rank's micro-batches of each step, and the position after it."""
        start, process = self.start, self.process
        steps = self.stream.steps(start.position, start.step, process.rank, process.world)
        pins = self.plan.device.type != "cpu"  # so that copies to the device need not wait
        for batches, position in steps:
            yield ([batch.pin_memory() for batch in batches] if pins else batches), position

    def _log(self, step: int, norm: torch.Tensor | float, mark: float) -> None:
        scores = self.updater.meter.read()
        skips = self.updater.skips
        skips.read()
        if skips.longest >= min(self.training.max_skipped, self.training.steps - self.start.step):
            raise FastElectraError(
                f"up to step {step} {skips.longest} updates in a row were skipped, since their"
                " losses or gradients were not numbers: lower optimizer.peak_lr or raise"
                " optimizer.warmup_steps, and run the same command again"
            )
        now = time.monotonic()
        record = {"kind": "train", "step": step, **self._with_total(scores)}
        record |= {"lr": self.updater.learning_rate(step), "grad_norm": float(norm)}
        record["skipped"] = self.start.skipped + skips.total
        record["tokens_per_second"] = scores["tokens"] / (now - mark)
        if self.peak_tokens:
            record["mfu"] = record["tokens_per_second"] / self.peak_tokens
        record["seconds_left"] = (
            (now - self.began) / (step - self.start.step) * (self.training.steps - step)
        )
        if self.report:
            self.report.write(record)

    def _with_total(self, scores: dict[str, float]) -> dict[str, float]:
        objective = self.config.objective
        main = "disc_loss" if objective.kind.detects else "main_loss"
        loss = objective.main_weight * scores[main]
        if objective.kind.generator:
            loss += objective.generator_weight * scores["mlm_loss"]
        return {"loss": loss, **scores}

    @torch.no_grad()
    def _evaluate(self, step: int) -> None:
        process, meter = self.process, Meter()
        batches = self.heldout.evaluation(self.training.eval_tokens, process.rank, process.world)
        self.engine.eval()
        for batch in prefetch(batches, AHEAD):
            meter.add(self.updater.forward(batch)[1])
        self.engine.train()
        scores = self._with_total(meter.read())
        if not math.isfinite(scores["loss"]):
            raise FastElectraError(
                f"the held-out loss is not a number at step {step}: lower optimizer.peak_lr or"
                " raise optimizer.warmup_steps, and run the same command again"
            )
        if self.report:
            self.report.write({"kind": "eval", "step": step, **scores})
            self.report.draw()
            self._complain(step, scores)

    def _complain(self, step: int, scores: dict[str, float]) -> None:
        """Say once, each time it begins, that a network does not learn."""
        found = {}
        if step >= self.config.optimizer.warmup_steps:
            found = complaints(scores, self.corpus.vocab_size)
        for name in found.keys() - self.complaints:
            self.process.say(f"warning: {found[name]}")
        self.complaints = set(found)

    def _save(self, step: int, position: Position, last: bool, ends: bool) -> None:
        """Begin to write a checkpoint, unless it might be one to which there is no sound way back:
        updates are being skipped, and it is not the last, which has just been evaluated."""
        skips = self.updater.skips
        if skips.in_row and not last:
            self.process.say(f"no checkpoint of step {step:,}: its update was skipped")
            return
        self.saver.save(
            self.engine,
            self.corpus.tokenizer_dir,
            ends,
            step=step,
            position=asdict(position),
            config=self.config.to_dict(),
            vocab_size=self.corpus.vocab_size,
            special_tokens=asdict(self.corpus.special),
            fingerprint=self.corpus.fingerprint,
            skipped=self.start.skipped + skips.total,
            loss_scale=portable.loss_scale(self.engine),
        )
