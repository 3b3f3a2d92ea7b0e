"""Adam as the paper uses it, and which parameters its weight decay leaves alone."""

import torch
from torch import nn

from fastelectra.config import OptimizerConfig

# Adam divides its moments by 1 − β^step; from this step on that is 1 to the last bit. In fp32
# adding 1 to it changes nothing.
UNCORRECTED = 1e9


MOMENT_KEYS = ("exp_avg", "exp_avg_sq")  # of a parameter's state


class PaperAdam(torch.optim.AdamW):
    """AdamW, fused, with or without bias correction: m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g²,
    w ← w − lr · (m / (√v + ε) + decay · w)."""

    def __init__(self, groups: list[dict], optimizer: OptimizerConfig):
        betas = (optimizer.beta1, optimizer.beta2)
        # The trainer sets lr before each step; DeepSpeed takes a trial step, which must do nothing.
        super().__init__(groups, lr=0.0, betas=betas, eps=optimizer.epsilon, fused=True)
        self.bias_correction = optimizer.bias_correction

    def adam_step(self, updates: int) -> float:
        """The `step` of a parameter's state after so many updates."""
        return float(updates) if self.bias_correction else UNCORRECTED

    @torch.no_grad()
    def step(self, closure=None):
        """One update; a parameter seen for the first time gets its state first."""
        for group in self.param_groups:
            group["capturable"] = _capturing()
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = {
                        "step": torch.tensor(self.adam_step(0), device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return super().step(closure)


def set_rate(group: dict, lr: float) -> None:
    """A group's learning rate from now on: in place where it is a tensor, which a graph reads."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for an optimizer: matrices and tables with decay; biases and LayerNorm without.

    Vectors are exactly the biases and LayerNorm weights, whatever their names.
    """
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
