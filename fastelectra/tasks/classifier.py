"""Google's fine-tuning model: the discriminator's encoder and a linear layer on its [CLS] vector.

No pooler, no tanh. The encoder is that of pre-training, kernels included; its last layer computes
the [CLS] rows only.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fastelectra.config import ModelConfig
from fastelectra.model.attention import layout_of
from fastelectra.model.embeddings import Embeddings
from fastelectra.model.encoder import Network
from fastelectra.tasks.packing import Packed
from fastelectra.tasks.table import ABOVE

DROPOUT = 0.1  # of the [CLS] vector


class Classifier(nn.Module):
    """Embeddings, encoder and head; parameters of the first two are named as Electra's."""

    def __init__(self, model: ModelConfig, vocab_size: int, outputs: int):
        super().__init__()
        self.embeddings = Embeddings(
            vocab_size, model.embedding_size, model.max_positions, model.dropout
        )
        self.discriminator = Network(model, None)
        self.head = nn.Linear(model.hidden_size, outputs)
        nn.init.xavier_uniform_(self.head.weight)  # tf.layers.dense
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Packed) -> torch.Tensor:
        """[S, outputs] in the head's precision, which may be higher than the encoder's."""
        layers = len(self.discriminator.encoder)
        seeds = torch.randint(2**63 - 1, (1 + 3 * layers,), device=batch.tokens.device)
        layout = layout_of(batch.cu_seqlens, len(batch.tokens), batch.max_length)
        embedded = self.embeddings(batch.tokens, batch.segments, batch.positions, seeds[:1])
        cls = self.discriminator(embedded, layout, seeds[1:], batch.cu_seqlens[:-1])  # (S, H)
        cls = F.dropout(cls.to(self.head.weight.dtype), DROPOUT, self.training)
        return self.head(cls)


def loss_of(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean [] over [S, outputs]: cross entropy with classes [S], or with one output the squared
    error from values [S]."""
    if outputs.shape[1] == 1:
        return F.mse_loss(outputs[:, 0], labels.to(outputs.dtype))
    return F.cross_entropy(outputs, labels.long())


def layer_groups(classifier: Classifier, decay: float, convention: str) -> list[dict]:
    """Groups for an optimizer, each with the `scale` of its learning rate.

    The head has 1, and each layer `decay` times that of the one above; embeddings and their
    projection are below the first. Google's code has one power more, decay², between the head and
    the top layer, and with it everything below; its published results contain that.
    """
    layers = len(classifier.discriminator.encoder)
    depths: dict[int, list[nn.Parameter]] = {}
    for name, parameter in classifier.named_parameters():
        if name.startswith("head."):
            depth = layers + ABOVE[convention]
        elif ".encoder." in name:
            depth = 1 + int(name.split(".")[2])
        else:
            depth = 0
        depths.setdefault(depth, []).append(parameter)
    top = max(depths)
    return [
        {"params": parameters, "weight_decay": 0.0, "scale": decay ** (top - depth)}
        for depth, parameters in sorted(depths.items())
    ]
