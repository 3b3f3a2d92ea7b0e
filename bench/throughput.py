"""Whole training steps of our trainer and of its peers, side by side in one run.

    python bench/throughput.py --size small --seq 128 --tokens-per-step 4096

Every round gives each contender the same number of steps (forward, backward, clipping, optimizer,
and making the batches unless --no-data), in an order that rotates; only real tokens count. Reports
tokens/s with quartiles, the median of the rounds' ratios to each peer, MFU, where the time of a
step goes, memory, and what the preset's whole run would cost at this speed.
"""

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from options import ROOT, check_outputs

from fastelectra import errors
from fastelectra.config import load_config
from fastelectra.errors import FastElectraError
from fastelectra.tasks.finetune import positive
from fastelectra.training import launch

PEERS = ("ours-eager", "ours-compiled", "natural", "careful", "compiled", "graphed",
         "natural-flash", "careful-flash", "compiled-flash")  # fmt: skip
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
MOST_TOKENS = 2**22  # of a micro-batch that --largest tries


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, count = parser.add_argument, positive(int)
    add("--size", choices=("small", "base", "large"), default="small", help="the preset")
    add("--seq", type=count, metavar="N", help="longest example (default: the preset's)")
    add("--tokens-per-step", type=count, metavar="N", help="default: the preset's micro-batch")
    add("--micro-batch", type=count, metavar="N", help="tokens (default: the whole step)")
    add("--lengths", choices=("full", "corpus", "ragged"), default="full", help="of the examples")
    add("--data", type=Path, default=ROOT / "data/demo", help="prepared corpus for corpus lengths")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--peers", nargs="*", choices=PEERS, help="default: all that make sense here")
    add("--rounds", type=count, default=10)
    add("--block", type=count, help="steps of a contender in a round (default: 3, on a GPU 20)")
    add("--warmup", type=count, help="steps before the rounds (default: 2, on a GPU 10)")
    add("--no-data", action="store_true", help="one step's batches, made beforehand and reused")
    add("--data-only", action="store_true", help="measure only how fast batches are made")
    add("--scaling", action="store_true", help="ours also over micro-batch, length and ranks")
    add("--largest", action="store_true", help="on a GPU: the largest micro-batch that fits")
    add("--profile", action="store_true", help="time by part, and a trace of ours beside FILE")
    add("--json", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="FILE", help="a picture")
    add("--local_rank", help=argparse.SUPPRESS)  # launchers add it
    args = parser.parse_args(argv)
    if args.data_only and (args.json or args.plot):
        parser.error("--data-only only prints: leave out --json and --plot")
    return args


class Bench:
    """The contenders of one run."""

    def __init__(self, args: argparse.Namespace, process: launch.Process):
        import torch
        from measure import Gemm
        from peers import peers_for

        self.args, self.process, self.device = args, process, launch.device()
        self.cuda = self.device.type == "cuda"
        names = peers_for(self.device, args.lengths) if args.peers is None else args.peers
        if names and process.world > 1:
            raise FastElectraError("peers train in one process: give --peers without names")
        self.workload = workload_of(args, args.tokens_per_step, args.micro_batch)
        self.gemm, self.gemm_rates = Gemm(self.device, getattr(torch, DTYPES[args.dtype])), []
        self.block = args.block or (20 if self.cuda else 3)
        self.runners, self.memory, self.unavailable = {}, {}, {}
        for name in dict.fromkeys(["ours", *names]):
            try:
                self.runners[name], self.memory[name] = self._start(name, self.workload)
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        """A peer that cannot run does not end the comparison; ours does."""
        if name == "ours":
            raise error
        if name in self.runners:
            self.runners.pop(name).close()
        self.unavailable[name] = reason(error)
        self.process.say(f"{name} cannot run: {self.unavailable[name]}")

    def _start(self, name: str, workload):
        """A warm runner, and the bytes a step takes at its peak (on a GPU with all that it keeps).

        Raises whatever keeps it from running.
        """
        import torch
        from measure import Runner, step_memory, synchronize
        from ours import Ours
        from peers import Peer

        self._free()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_reserved()
        if name.startswith("ours"):
            contender = Ours(name, workload, self.device, self.process)
        else:
            contender = Peer(name, workload, self.device)
        runner = Runner(contender, workload.steps(self.process), self.args.no_data)
        try:
            for _ in range(self.args.warmup or (10 if self.cuda else 2)):
                runner.step()
            synchronize(self.device)
        except BaseException:
            runner.close()
            raise
        if self.cuda:  # reserved, not allocated: what CUDA graphs keep counts
            return runner, torch.cuda.max_memory_reserved() - held
        return runner, step_memory(runner.step)

    def run(self) -> None:
        """All rounds; each also times the large product. Of one process an interrupt ends them."""
        try:
            for number in range(self.args.rounds):
                self._round(number)
        except KeyboardInterrupt:
            if not self.gemm_rates or self.process.world > 1:
                raise
        self.rounds = len(self.gemm_rates)
        for runner in self.runners.values():
            del runner.rates[self.rounds :], runner.waits[self.rounds :]

    def _round(self, number: int) -> None:
        names = list(self.runners)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            try:
                self.runners[name].block(self.block)
            except Exception as error:
                self._drop(name, error)
        self.gemm_rates.append(self.gemm.rate())

    def results(self) -> dict:
        """Everything measured, as JSON values."""
        from measure import provenance, quartiles
        from workload import data_rate

        from fastelectra.training.flops import flops_per_token, peak_flops

        args, config = self.args, self.workload.config
        sheet = peak_flops(self.device, args.dtype)
        result = {
            "provenance": provenance(),
            "settings": {
                "size": args.size, "lengths": args.lengths, "dtype": args.dtype,
                "max_length": config.data.max_length,
                "tokens_per_step": config.training.batch_tokens,
                "micro_batch_tokens": config.training.micro_batch_tokens,
                "ranks": self.process.world, "rounds": self.rounds, "steps_a_round": self.block,
                "rounds_wanted": args.rounds, "data_loading": not args.no_data,
            },
            "flop_per_token": flops_per_token(self.workload.attended(), self.workload.vocab_size),
            "gemm_flop_per_s": quartiles(self.gemm_rates),
            "data_sheet_flop_per_s": sheet,
            "unavailable": self.unavailable,
        }  # fmt: skip
        result["contenders"] = {name: self._result(name, result) for name in self.runners}
        if not args.no_data:
            per_core = data_rate(self.workload)
            ours = result["contenders"]["ours"]["tokens_per_s"]["median"]
            result["data"] = {"tokens_per_s_per_core": per_core, "times_the_step": per_core / ours}
        return result

    def _result(self, name: str, result: dict) -> dict:
        from measure import quartiles

        runner, ours = self.runners[name], self.runners["ours"].rates
        rate = quartiles(runner.rates)
        flops = rate["median"] * result["flop_per_token"] / self.process.world
        preset = load_config(ROOT / "configs" / f"{self.args.size}.json")
        hours = None  # at another length the run would be another
        if self.workload.config.data.max_length == preset.data.max_length:
            training = preset.training
            hours = training.steps * training.batch_tokens / rate["median"] / 3600
        wait = quartiles(runner.waits)["median"]
        sheet = result["data_sheet_flop_per_s"]
        whole = self.rounds == self.args.rounds  # else time is up, and batches may have ended
        split = runner.split(min(5, self.rounds)) if whole else {}
        ratios = [mine / its for mine, its in zip(ours, runner.rates, strict=True)]
        return {
            "tokens_per_s": rate,
            "ours_is_times": quartiles(ratios),
            "mfu_of_gemm": flops / result["gemm_flop_per_s"]["median"],
            "mfu_of_data_sheet": flops / sheet if sheet else None,
            "step_seconds": {"data wait": wait, **split},
            "memory_bytes": self.memory[name],
            "full_run_hours": hours,
            "full_run_device_days": hours and hours / 24 * self.process.world,
            "losses": runner.contender.losses(),
            "rates_by_round": runner.rates,
        }

    def profile(self, trace: Path) -> dict[str, dict[str, float]]:
        """Milliseconds of a step by part, for every contender; writes a trace of ours."""
        trace.parent.mkdir(parents=True, exist_ok=True)
        return {
            name: runner.profile(self.workload.vocab_size, trace if name == "ours" else None)
            for name, runner in self.runners.items()
        }

    def largest(self) -> Iterator[tuple[str, int]]:
        """Contenders and ever larger micro-batches that fit the GPU: doubled, at last by a half.

        Ends all contenders.
        """
        names = list(self.runners)
        self.close()
        for name in names:
            first = tokens = self.workload.config.training.micro_batch_tokens
            while tokens <= MOST_TOKENS and self._fits(name, tokens):
                yield name, tokens
                tokens *= 2
            between = 3 * tokens // 4
            if first < tokens <= MOST_TOKENS and self._fits(name, between):
                yield name, between

    def _fits(self, name: str, tokens: int) -> bool:
        try:
            runner, _ = self._start(name, workload_of(self.args, tokens, tokens))
        except RuntimeError as error:  # out of memory; during a capture under other names
            self.process.say(f"{name} in micro-batches of {tokens:,}: {reason(error)}")
            return False
        runner.close()
        return True

    def close(self) -> None:
        """End every contender."""
        for runner in self.runners.values():
            runner.close()
        self.runners.clear()
        self._free()

    def _free(self) -> None:
        """Give a GPU's memory back that nothing holds."""
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """What an error says, on one line."""
    text = " ".join(str(error).split())[:300] or repr(error)
    return f"{type(error).__name__}: {text}"


def run(args: argparse.Namespace, environment: dict) -> int:
    """Measure, print, write."""
    process = launch.prepare()
    check_outputs(args.json, picture=args.plot)
    if args.data_only:
        return data_only(args)
    import torch  # reads what launch.prepare has set

    if args.largest and launch.device().type != "cuda":
        raise FastElectraError("--largest is for GPUs: PyTorch sees none here")
    bench = Bench(args, process)
    bench.run()
    result = bench.results()
    if process.leads:
        save(args, result)  # before what may fail or run out of time
    if bench.rounds < args.rounds:
        bench.close()
        report(args, result)
        return 130  # as of what is interrupted
    if args.profile:
        stem = (args.json or Path("throughput")).with_suffix("")
        result["profile_ms"] = bench.profile(stem.with_name(stem.name + "-trace.json.gz"))
    if args.largest:
        found = result["largest_micro_batch_tokens"] = {}
        for name, tokens in bench.largest():
            found[name] = tokens
            process.say(f"{name} in micro-batches of {tokens:,}: fits")
            if process.leads:
                save(args, result)
    bench.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not process.leads:
        return 0
    if args.scaling:
        from scaling import scaling

        result["scaling"] = scaling(args, result, environment)
    report(args, result)
    return 0


def workload_of(args: argparse.Namespace, tokens: int | None, micro: int | None):
    """The workload that was asked for, with so many tokens a step and a micro-batch."""
    from workload import make_workload

    return make_workload(args.size, args.seq, tokens, micro, args.lengths, args.dtype, args.data)


def data_only(args: argparse.Namespace) -> int:
    """How fast one core makes batches."""
    from workload import data_rate

    workload = workload_of(args, args.tokens_per_step, args.micro_batch)
    print(f"batches of {args.lengths} lengths: {data_rate(workload):,.0f} tokens/s a core")
    return 0


def save(args: argparse.Namespace, result: dict) -> None:
    """Write the JSON, if it was asked for."""
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.json}", flush=True)


def report(args: argparse.Namespace, result: dict) -> None:
    """Print, and write what was asked for."""
    from report import draw, lines

    print("\n".join(lines(result)), flush=True)
    save(args, result)
    if args.plot:
        draw(result, args.plot)
        print(f"wrote {args.plot}")


def main(argv: list[str] | None = None) -> int:
    """Parse and run; what is launched from here gets the environment as it was before."""
    return run(parse(argv), dict(os.environ))


if __name__ == "__main__":
    sys.exit(errors.run(main))
