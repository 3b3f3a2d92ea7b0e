"""Checkpoints written beside training, which waits only while tensors are copied to the host."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from fastelectra.config import TrainingConfig
from fastelectra.errors import FastElectraError
from fastelectra.training import checkpoint, portable
from fastelectra.training.checkpoint import Tensors
from fastelectra.training.launch import Process


class Saver:
    """Writes one checkpoint at a time in a thread; every rank writes its share of the tensors.

    A checkpoint that cannot be written is an error on all ranks: `failed` tells of it, `wait`
    raises it. Unless `training.stop_when_not_saved` is false: then rank 0 warns, and that is all,
    but not of the last one, without which the run would be lost.
    """

    def __init__(self, training: TrainingConfig, process: Process):
        self.run, self.training, self.process = Path(training.output_dir), training, process
        self._group = torch.distributed.new_group(backend="gloo")  # apart from training's own
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None

    def save(self, engine: portable.Engine, tokenizer_dir: Path, last: bool, **state) -> None:
        """Copy the engine's tensors and begin to write them, after what is still being written.

        `state` is that of checkpoint.write_checkpoint. All ranks call it. Raises as `wait`.
        """
        self.wait()
        share = portable.gather(engine)
        target = checkpoint.checkpoint_folder(self.run, state["step"])
        self._writing = self._thread.submit(self._write, target, share, tokenizer_dir, last, state)

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise at once."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def wait(self) -> None:
        """Until all is written. Raises FastElectraError if it could not be."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _write(
        self,
        target: Path,
        share: tuple[Tensors, Tensors],
        tokenizer_dir: Path,
        last: bool,
        state: dict,
    ) -> None:
        rank, world = self.process.rank, self.process.world
        try:
            with ExitStack() as folder:
                with self._together(target):
                    if self.process.leads:
                        folder.enter_context(checkpoint.write_folder(target))
                with self._together(target):
                    checkpoint.write_share(checkpoint.aside_of(target), *share, rank, world)
                with self._together(target):
                    if self.process.leads:
                        checkpoint.write_rest(checkpoint.aside_of(target), tokenizer_dir, state)
                        folder.close()  # there it is
                        checkpoint.tidy(self.run, self.training.keep_last, self.training.keep_every)
        except FastElectraError as error:
            if last or self.training.stop_when_not_saved:
                raise
            self.process.say(f"warning: {error}; training goes on")

    @contextmanager
    def _together(self, target: Path) -> Iterator[None]:
        """What fails on one rank fails on all."""
        error = None
        try:
            with checkpoint.reported(target):
                yield
        except FastElectraError as caught:
            error = caught
        failed = torch.tensor(int(error is not None))
        torch.distributed.all_reduce(failed, group=self._group)
        if error:
            raise error
        if failed:
            raise FastElectraError(f"another process could not write its part of {target}")
