"""Models in and out: pretrained weights for a classifier, and fine-tuned ones for Hugging Face.

OUT/model/          for AutoModelForSequenceClassification
    model.safetensors  config.json  tokenizer files

Hugging Face's head is dense(H → H) → GELU → linear, Google's is linear. It fits in exactly, since
GELU(z) − GELU(−z) = z: the dense layer computes z and −z for each output z, the last their
difference. (Its other rows are 0.)
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from fastelectra.config import ModelConfig, config_from_dict
from fastelectra.data import vocabulary
from fastelectra.hub import hub_config, read_tokenizer
from fastelectra.model.hub_names import to_hub
from fastelectra.model.hub_reader import check_folder, encoder_tensor, read_encoder, read_json
from fastelectra.tasks.classifier import DROPOUT, Classifier
from fastelectra.tasks.table import Task
from fastelectra.training import checkpoint

PARTS = ("", "discriminator", "mlm", "model")  # of an export, and of what finetune writes
MODEL = "model"


@dataclass(frozen=True)
class PretrainedEncoder:
    """An encoder to fine-tune, and how to make tokens for it."""

    folder: Path
    model: ModelConfig
    vocab_size: int
    weights: dict[str, torch.Tensor]  # of the embeddings and the discriminator's encoder, fp32
    head: tuple[torch.Tensor, torch.Tensor] | None  # weight and bias, of a fine-tuned model
    tokenizer: Tokenizer
    special: dict[str, int]

    def classifier(self, outputs: int, seed: int) -> Classifier:
        """A classifier that begins with these weights; those of a new head follow from `seed`."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            classifier = Classifier(self.model, self.vocab_size, outputs)
            for name, parameter in classifier.named_parameters():
                if not name.startswith("head."):
                    parameter.copy_(self.weights[name])
            for parameter, value in zip(
                classifier.head.parameters(), self.head or (), strict=False
            ):
                parameter.copy_(value)
        return classifier


def load(path: str) -> PretrainedEncoder:
    """Load a run, checkpoint, export, fine-tuned or Hugging Face Electra folder.

    Raises FastElectraError for what is none of these, or damaged.
    """
    given = Path(path)
    check_folder(given)
    is_run = (given / "checkpoints").is_dir()
    found = (given / part for part in PARTS if (given / part / "config.json").is_file())
    folder = None if is_run else next(found, None)
    if folder is None:
        return checkpoint.use(given, _load_checkpoint)
    model, vocab_size, tensors = read_encoder(folder)
    return _pretrained(folder, model, vocab_size, tensors, _read_head(folder, tensors), folder)


def _load_checkpoint(folder: Path) -> PretrainedEncoder:
    state = checkpoint.read_state(folder)
    model = config_from_dict(state["config"], str(folder / checkpoint.STATE)).model
    tensors, tokenizer_dir = checkpoint.read_weights(folder), folder / checkpoint.TOKENIZER
    return _pretrained(folder, model, state["vocab_size"], tensors, None, tokenizer_dir)


def _pretrained(
    folder: Path, model: ModelConfig, vocab_size: int, tensors: dict, head, tokenizer_dir: Path
) -> PretrainedEncoder:
    with torch.device("meta"):
        shapes = Classifier(model, vocab_size, 1).state_dict()
    weights = {}
    for name, parameter in shapes.items():
        if name.startswith("head."):
            continue
        if name in tensors and tensors[name].shape == parameter.shape:
            weights[name] = tensors[name].float()
        else:
            weights[name] = encoder_tensor(name, parameter.shape, folder, tensors)
    tokenizer, special = read_tokenizer(tokenizer_dir, vocab_size)
    return PretrainedEncoder(folder, model, vocab_size, weights, head, tokenizer, special)


def write(
    folder: Path, classifier: Classifier, pretrained: PretrainedEncoder, task: Task, max_length: int
) -> None:
    """Write an ElectraForSequenceClassification with the same outputs, times the task's scale."""
    vocabulary.write(pretrained.tokenizer, folder, max_length)
    config = hub_config(
        pretrained.model, "discriminator", pretrained.vocab_size, pretrained.special["pad"]
    )
    names = task.labels or ("score",)
    config |= {
        "architectures": ["ElectraForSequenceClassification"],
        "classifier_dropout": DROPOUT,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "single_label_classification" if task.labels else "regression",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: value.detach().cpu() for name, value in classifier.named_parameters()}
    head = weights.pop("head.weight"), weights.pop("head.bias")
    tensors = to_hub(weights, "discriminator") | _hub_head(*head, task.scale)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def most_outputs(model: ModelConfig) -> int:
    """How many outputs of a linear layer Hugging Face's head can express exactly."""
    return model.hidden_size // 2


def _hub_head(weight: torch.Tensor, bias: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
    """Hugging Face's head that computes scale · (weight x + bias)."""
    outputs, hidden_size = weight.shape
    dense, dense_bias = torch.zeros(hidden_size, hidden_size), torch.zeros(hidden_size)
    dense[: 2 * outputs] = torch.cat([weight, -weight])
    dense_bias[: 2 * outputs] = torch.cat([bias, -bias])
    difference = torch.zeros(outputs, hidden_size)
    difference[:, :outputs] = scale * torch.eye(outputs)
    difference[:, outputs : 2 * outputs] = -scale * torch.eye(outputs)
    return {
        "classifier.dense.weight": dense,
        "classifier.dense.bias": dense_bias,
        "classifier.out_proj.weight": difference,
        "classifier.out_proj.bias": torch.zeros(outputs),
    }


def _read_head(
    folder: Path, tensors: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The head that _hub_head wrote; None if there is another one or none."""
    names = _hub_head(torch.zeros(1, 2), torch.zeros(1), 1.0)
    if not all(name in tensors for name in names):
        return None
    outputs = len(tensors["classifier.out_proj.weight"])
    scale = float(tensors["classifier.out_proj.weight"].flatten()[0])
    head = tuple(tensors[f"classifier.dense.{part}"][:outputs] for part in ("weight", "bias"))
    rebuilt = _hub_head(*head, scale) if len(head[0]) * 2 <= head[0].shape[1] else {}
    same = rebuilt and all(torch.equal(rebuilt[name], tensors[name]) for name in names)
    return head if same else None


def class_names(folder: Path) -> tuple[str, ...]:
    """The labels of a fine-tuned model's outputs, as its config.json lists them."""
    labels = read_json(folder / "config.json").get("id2label")
    return tuple(labels.values()) if isinstance(labels, dict) else ()
