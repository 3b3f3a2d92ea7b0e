"""From the sums that the model reports to the numbers that people read."""

import math

import torch

THRESHOLD = 512  # first histogram bin of logits ≥ 0, probability ≥ ½
COLLAPSED = 0.02  # a discriminator that beats the prior by less has learnt nothing beyond it
COUNTS = ("mlm_loss", "mlm_correct", "masked", "replaced", "disc_loss", "tokens")


class Meter:
    """Adds up the model's metrics on the device; waits for it only when read."""

    def __init__(self):
        self._sums: torch.Tensor | None = None  # float64: counts outgrow float32

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        """Add one micro-batch's sums."""
        flat = torch.cat([metrics[name].flatten() for name in (*COUNTS, "histogram")])
        if self._sums is None:
            self._sums = torch.zeros_like(flat, dtype=torch.float64)
        self._sums += flat

    def read(self) -> dict[str, float]:
        """Scores over everything added on all ranks since the last read. All ranks call it."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._sums)
        sums, self._sums = self._sums.cpu(), None
        counts = dict(zip(COUNTS, sums.tolist(), strict=False))
        return scores(counts, sums[len(COUNTS) :].view(2, -1))


def scores(counts: dict[str, float], histogram: torch.Tensor) -> dict[str, float]:
    """What the sums say; NaN where there was nothing to judge.

    histogram [2, bins]: tokens by the discriminator's logit; row 0 originals, row 1 replaced.
    """
    masked, tokens, replaced = counts["masked"], counts["tokens"], counts["replaced"]
    fake_rate = _ratio(replaced, tokens)
    disc_loss = _ratio(counts["disc_loss"], tokens)
    prior = entropy(fake_rate)
    flagged = histogram[:, THRESHOLD:].sum(1).tolist()
    return {
        "mlm_loss": _ratio(counts["mlm_loss"], masked),
        "mlm_accuracy": _ratio(counts["mlm_correct"], masked),  # of the likeliest token
        "sampled_accuracy": _ratio(masked - replaced, masked),
        "fake_rate": fake_rate,
        "disc_loss": disc_loss,
        "prior_loss": prior,  # H(fake rate): BCE of a constant guess
        "gain": 1 - _ratio(disc_loss, prior),
        "precision": _ratio(flagged[1], sum(flagged)),
        "recall": _ratio(flagged[1], replaced),
        "auc": area_under_curve(histogram),
        "tokens": tokens,
    }


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


def collapsed(gain: float) -> bool:
    """Whether the discriminator does no better than the rate of fakes alone (ELECTRA's H(r))."""
    return gain < COLLAPSED
