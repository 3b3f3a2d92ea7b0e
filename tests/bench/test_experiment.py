"""The objectives' benchmark: what it asks for; its runs take an hour."""

import objectives
import pytest

from fastelectra.config import OBJECTIVES
from fastelectra.data.shards import open_corpus
from fastelectra.errors import FastElectraError
from fastelectra.training.flops import flops_per_token


@pytest.fixture
def experiment(corpus, tmp_path):
    made = objectives.Experiment(objectives.CPU, tmp_path / "work", None, gpu=False)
    made.corpus = open_corpus(corpus)
    return made


def test_all_objectives_get_the_same_compute(experiment):
    spent = {}
    for name in OBJECTIVES:
        config = experiment.config(name)
        assert config.objective.name == name
        assert len(experiment.steps(config)) == objectives.CPU.points
        flop = flops_per_token(config, experiment.corpus.vocab_size)
        spent[name] = config.training.steps * config.training.batch_tokens * flop
    assert max(spent.values()) < 1.01 * min(spent.values())


def test_a_folder_is_of_one_experiment(experiment):
    experiment._check_work()
    experiment._check_work()
    experiment.texts = ["other.txt"]
    with pytest.raises(FastElectraError, match=r"text = demo, now it is .* name another --work"):
        experiment._check_work()
