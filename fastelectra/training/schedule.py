"""The learning rate of the paper: linear warm-up times linear decay, both from step 0."""


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Rate of the update that takes the weights from `step` updates to `step` + 1.

    peak · (1 − step/total) · min(1, step/warmup), as google-research/electra computes it from its
    global step: the first update (step 0) has rate 0, the last (step total − 1) nearly 0.
    """
    warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return peak * (1 - step / total_steps) * warmup
