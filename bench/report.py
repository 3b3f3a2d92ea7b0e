"""What throughput.py measured, as text and as a picture."""

from pathlib import Path


def lines(result: dict) -> list[str]:
    """The report for a terminal."""
    settings, gemm = result["settings"], result["gemm_flop_per_s"]
    where, ranks = result["provenance"], settings["ranks"]
    rounds = f"{settings['rounds']} rounds"
    if settings["rounds"] < settings["rounds_wanted"]:
        rounds += f" (cut short: of {settings['rounds_wanted']})"
    data = "data loading included" if settings["data_loading"] else "one batch reused"
    text = [
        "",
        f"{settings['size']}, examples of {settings['max_length']} ({settings['lengths']}),"
        f" {settings['tokens_per_step']:,} tokens a step in micro-batches of"
        f" {settings['micro_batch_tokens']:,}, {settings['dtype']}, {data}",
        f"on {where['gpu'] or where['cpu']}, {ranks} rank{'s' * (ranks > 1)},"
        f" {where['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items()),
        "ours runs on the trainer's plain engine, without DeepSpeed's",
        f"{rounds} of {settings['steps_a_round']} steps each; a token costs"
        f" {result['flop_per_token'] / 1e6:.1f} MFLOP; large products run at"
        f" {gemm['median'] / 1e9:,.0f} GFLOP/s ({gemm['low'] / 1e9:,.0f}–"
        f"{gemm['high'] / 1e9:,.0f})",
        "",
        f"{'':16s}{'tokens/s (quartiles)':>32s}{'ours is':>9s}{'of GEMM':>9s}{'of sheet':>9s}"
        f"{'step memory':>13s}{'full run':>22s}   losses",
    ]
    text += [_row(name, row) for name, row in result["contenders"].items()]
    text += [f"{name:16s} cannot run: {why}" for name, why in result["unavailable"].items()]
    text += ["", *_table("ms a step", 1e3, {
        name: row["step_seconds"] for name, row in result["contenders"].items()
    })]  # fmt: skip
    if "profile_ms" in result:
        text += ["", *_table("ms a step, profiled", 1, result["profile_ms"])]
    if "largest_micro_batch_tokens" in result:
        text += [""] + [
            f"largest micro-batch of {name}: {tokens:,} tokens"
            for name, tokens in result["largest_micro_batch_tokens"].items()
        ]
    if made := result.get("data"):
        text.append(
            f"\nbatches are made at {made['tokens_per_s_per_core']:,.0f} tokens/s a core:"
            f" {made['times_the_step']:,.0f} × what the step takes"
        )
    return text


def _row(name: str, row: dict) -> str:
    rate, sheet, memory = row["tokens_per_s"], row["mfu_of_data_sheet"], row["memory_bytes"]
    ratio = row["ours_is_times"]["median"]
    hours, days = row["full_run_hours"], row["full_run_device_days"]
    quartiles = f"({rate['low']:,.0f}–{rate['high']:,.0f})"
    return (
        f"{name:16s}{rate['median']:>12,.0f}{quartiles:>20s}{ratio:>7.2f} ×"
        f"{row['mfu_of_gemm']:>9.1%}{'–' if sheet is None else f'{sheet:.1%}':>9s}"
        f"{'–' if memory is None else f'{memory / 1e6:,.0f} MB':>13s}"
        f"{'–' if hours is None else f'{hours:,.1f} h{days:>6,.1f} d':>22s}"
        f"   {row['losses'][0]:.3f} {row['losses'][1]:.4f}"
    )


def _table(title: str, factor: float, columns: dict[str, dict[str, float]]) -> list[str]:
    """A row a part, a column a contender."""
    parts = list(dict.fromkeys(part for column in columns.values() for part in column))
    text = [f"{title:28s}" + "".join(f"{name:>16s}" for name in columns)]
    for part in parts:
        times = (f"{factor * c[part]:.2f}" if part in c else "–" for c in columns.values())
        text.append(f"{part:28s}" + "".join(f"{time:>16s}" for time in times))
    return text


def draw(result: dict, path: Path) -> None:
    """Bars of tokens/s with quartiles; curves of what --scaling measured."""
    from matplotlib.figure import Figure

    points = [point for point in result.get("scaling", ()) if "tokens_per_s" in point]
    groups = list(dict.fromkeys(point["by"] for point in points))
    figure = Figure(figsize=(6 + 4 * len(groups), 4), dpi=120, layout="constrained")
    bars, *others = figure.subplots(1, 1 + len(groups), squeeze=False)[0]
    rates = {name: row["tokens_per_s"] for name, row in result["contenders"].items()}
    medians = [rate["median"] for rate in rates.values()]
    colors = ["#2563eb" if name == "ours" else "#9aa5b1" for name in rates]
    drawn = bars.barh(list(rates), medians, xerr=_errors(rates.values()), color=colors, capsize=3)
    bars.bar_label(drawn, [f"{median:,.0f}" for median in medians], padding=6)
    bars.margins(x=0.2)
    bars.invert_yaxis()
    settings, where = result["settings"], result["provenance"]
    bars.set_title(
        f"{settings['size']}@{settings['max_length']}, {settings['lengths']} lengths,"
        f" {settings['dtype']}\n{where['gpu'] or where['cpu']}, {where['time'][:10]}", fontsize=9,
    )  # fmt: skip
    bars.set_xlabel("tokens/s")
    for axes, by in zip(others, groups, strict=True):
        here = [point for point in points if point["by"] == by]
        rates = [point["tokens_per_s"] for point in here]
        medians = [rate["median"] for rate in rates]
        axes.errorbar(
            [str(point["value"]) for point in here], medians, _errors(rates), marker="o", capsize=3
        )
        axes.set_xlabel(by)
        axes.set_ylabel("tokens/s")
        axes.set_ylim(bottom=0)
    figure.savefig(path)


def _errors(rates) -> list[list[float]]:
    """Distances of the quartiles from the median, below and above."""
    below = [rate["median"] - rate["low"] for rate in rates]
    return [below, [rate["high"] - rate["median"] for rate in rates]]
