"""The plain engine's gradients are those of the model's loss, whatever the two networks share."""

import copy

import pytest
import torch
from launching import tiny_config

from fastelectra.config import OBJECTIVES, config_from_dict
from fastelectra.data.batch import BatchShape
from fastelectra.data.shards import open_corpus
from fastelectra.data.stream import BatchStream, Position
from fastelectra.model.electra import Electra
from fastelectra.training.plain import PlainEngine, total_norm

CASES = [("electra", sharing) for sharing in ("all", "tokens", "none")]
CASES += [(objective, "all") for objective in OBJECTIVES if objective != "electra"]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("objective", "sharing"), CASES)
def test_gradients_are_those_of_the_sum_of_the_losses(corpus, objective, sharing, count):
    config = tiny_config(corpus, "unused", batch_tokens=400 * count, micro_batch_tokens=400)
    config["objective"] = {"name": objective}
    config["model"]["embedding_sharing"] = sharing
    config, opened = config_from_dict(config), open_corpus(corpus)
    shape = BatchShape.of(400, 64, 0.15)
    stream = BatchStream(opened.split("train"), opened.special, config.data, shape, count, seed=0)
    batches = next(stream.steps(Position(), 0, 0, 1))[0]
    torch.manual_seed(0)
    model = Electra(config.model, opened.vocab_size, config.objective)
    engine = PlainEngine(copy.deepcopy(model), config, count, torch.float32)
    for _ in range(2):  # the second step's overwrite those of the first
        model.zero_grad()
        for batch in batches:
            torch.manual_seed(batch.seed)
            loss, expected = model(batch)
            loss.backward()
            torch.manual_seed(batch.seed)
            metrics, valid = engine.learn(batch)
            assert valid
            assert metrics.keys() == expected.keys()
            assert all(torch.equal(metrics[name], expected[name]) for name in expected)
            engine.micro_steps += 1
    named = dict(model.named_parameters())
    for name, parameter in engine.module.named_parameters():
        gradient = named[name].grad
        difference = (engine.places[parameter] - gradient).norm()
        assert difference <= 1e-6 * gradient.norm()


def test_the_norm_of_many_numbers():
    gradients = torch.randn(2**25, generator=torch.Generator().manual_seed(0)).mul_(1e-4)
    norm = total_norm([gradients, gradients[:1000]])
    exact = (gradients.double().norm() ** 2 + gradients[:1000].double().norm() ** 2).sqrt()
    assert abs(norm / exact - 1) < 1e-4
