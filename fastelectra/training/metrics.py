"""From the sums that the model reports to the numbers that people read."""

import math

import torch

THRESHOLD = 512  # first histogram bin of logits ≥ 0, probability ≥ ½
COLLAPSED = 0.02  # a discriminator that beats the prior by less has learnt nothing beyond it
IDLE = 0.9  # of ln(vocabulary): a generator with a greater loss has not even learnt word counts


class Meter:
    """Adds up the model's metrics on the device; waits for it only when read."""

    def __init__(self):
        self._sums: torch.Tensor | None = None  # float64: counts outgrow float32
        self._shapes: dict[str, torch.Size] = {}

    def add(self, metrics: dict[str, torch.Tensor], valid: torch.Tensor | None = None) -> None:
        """Add one micro-batch's sums, unless `valid` [] is false."""
        self._shapes = {name: value.shape for name, value in metrics.items()}
        flat = torch.cat([value.flatten() for value in metrics.values()])
        if valid is not None:
            flat = flat.where(valid, 0)
        if self._sums is None:
            self._sums = torch.zeros_like(flat, dtype=torch.float64)
        self._sums += flat

    def read(self) -> dict[str, float]:
        """Scores over everything added on all ranks since the last read. All ranks call it."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._sums)
        sums, self._sums = self._sums.cpu(), None
        parts = sums.split([shape.numel() for shape in self._shapes.values()])
        found = dict(zip(self._shapes, parts, strict=True))
        histogram = found.pop("histogram", None)
        counts = {name: value.item() for name, value in found.items()}
        return scores(counts, None if histogram is None else histogram.view(2, -1))


class Skips:
    """Counts the updates that were skipped; waits for the device only when read."""

    def __init__(self):
        self._norms: list[torch.Tensor | float] = []  # not looked at yet
        self.total, self.in_row, self.longest = 0, 0, 0

    def add(self, norm: torch.Tensor | float) -> None:
        """Add an update: one with a norm that is not finite was skipped."""
        self._norms.append(norm)

    def read(self) -> None:
        """Bring up to date: `total`, `in_row` until now, and the `longest` row so far."""
        for norm in map(float, self._norms):
            self.in_row = 0 if math.isfinite(norm) else self.in_row + 1
            self.total += self.in_row > 0
            self.longest = max(self.longest, self.in_row)
        self._norms = []


def scores(counts: dict[str, float], histogram: torch.Tensor | None = None) -> dict[str, float]:
    """What the sums of an objective say, of the networks it has; NaN where there was nothing.

    histogram [2, bins]: tokens by the discriminator's logit; row 0 originals, row 1 replaced.
    """
    masked, tokens, predicted = counts["masked"], counts["tokens"], counts["predicted"]
    found = {}
    if "mlm_loss" in counts:
        found |= {
            "mlm_loss": _ratio(counts["mlm_loss"], masked),
            "mlm_accuracy": _ratio(counts["mlm_correct"], masked),  # of the likeliest token
            "sampled_accuracy": _ratio(masked - counts["replaced"], masked),
            "fake_rate": _ratio(counts["replaced"], tokens),
        }
    if histogram is not None:
        disc_loss = _ratio(counts["disc_loss"], predicted)
        prior = entropy(_ratio(counts["replaced"], predicted))
        flagged = histogram[:, THRESHOLD:].sum(1).tolist()
        found |= {
            "disc_loss": disc_loss,
            "prior_loss": prior,  # H(fake rate): BCE of a constant guess
            "gain": 1 - _ratio(disc_loss, prior),
            "precision": _ratio(flagged[1], sum(flagged)),
            "recall": _ratio(flagged[1], counts["replaced"]),
            "auc": area_under_curve(histogram),
        }
    else:  # a main network that predicts tokens
        found |= {
            "main_loss": _ratio(counts["main_loss"], predicted),
            "main_accuracy": _ratio(counts["main_correct"], predicted),
        }
    return {**found, "tokens": tokens}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def entropy(rate: float) -> float:
    """H(rate) in nats: the loss of always predicting `rate` for events of that rate."""
    if not 0 < rate < 1:
        return math.nan if math.isnan(rate) else 0.0
    return -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)


def area_under_curve(histogram: torch.Tensor) -> float:
    """Probability that a replaced token scores above an original one; ties count half."""
    originals, replaced = histogram.double()
    below = originals.cumsum(0) - originals
    wins = (replaced * (below + originals / 2)).sum().item()
    return _ratio(wins, originals.sum().item() * replaced.sum().item())


def complaints(scores: dict[str, float], vocab_size: int) -> dict[str, str]:
    """What held-out scores say is wrong with a network after warm-up, by its name."""
    found, chance = {}, math.log(vocab_size)
    if scores.get("gain", 1.0) < COLLAPSED:
        found["discriminator"] = (
            f"the discriminator's loss {scores['disc_loss']:.4f} is no better than H(fake rate) ="
            f" {scores['prior_loss']:.4f}: it has learnt nothing beyond the rate of fakes. If this"
            " lasts, lower optimizer.peak_lr or model.generator_fraction"
        )
    if scores.get("mlm_loss", 0.0) > IDLE * chance:
        found["generator"] = (
            f"the generator's loss {scores['mlm_loss']:.3f} is hardly better than that of a uniform"
            f" guess, ln(vocabulary) = {chance:.3f}: it does not learn. If this lasts, change"
            " optimizer.peak_lr, or raise objective.generator_weight or model.generator_fraction"
        )
    if scores.get("main_loss", 0.0) > IDLE * chance:
        found["main network"] = (
            f"the main network's loss {scores['main_loss']:.3f} is hardly better than that of a"
            f" uniform guess, ln(vocabulary) = {chance:.3f}: it does not learn. If this lasts,"
            " change optimizer.peak_lr"
        )
    return found
