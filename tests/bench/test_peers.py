"""The peers train on our batches, and compute our losses from our weights."""

import dataclasses

import pytest
import torch
from peers import Pair, Style
from workload import make_workload, padded

from fastelectra.config import config_from_dict
from fastelectra.model.electra import Electra

MODEL = {"layers": 2, "hidden_size": 32, "intermediate_size": 64, "heads": 4, "embedding_size": 16,
         "generator_fraction": 0.5, "dropout": 0, "attention_dropout": 0}  # fmt: skip


def workload(lengths, tmp_path):
    made = make_workload("small", 32, 512, None, lengths, "fp32", tmp_path)
    model = config_from_dict({"model": MODEL}).model
    return dataclasses.replace(made, config=dataclasses.replace(made.config, model=model))


def first_batch(work):
    return next(work.steps())[0]


def test_full_lengths_need_no_padding(tmp_path, monkeypatch):
    monkeypatch.setattr("workload.SHARD_TOKENS", 5_000)
    work = workload("full", tmp_path)
    for (batch,), _ in zip(work.steps(), range(25), strict=False):  # more than an epoch
        assert batch.cu_seqlens[-1] == len(batch.tokens) == 512
        assert padded(batch).mask is None
        assert padded(batch).tokens.shape == (16, 32)


def test_padded_batches_hold_the_packed_ones(tmp_path):
    batch = first_batch(workload("ragged", tmp_path))
    matrices = padded(batch)
    real = matrices.mask.bool()
    total = int(batch.cu_seqlens[-1])
    assert torch.equal(matrices.tokens[real].int(), batch.tokens[:total])
    assert torch.equal(matrices.segments[real].int(), batch.segments[:total])
    count = int((batch.labels >= 0).sum())
    labels = matrices.labels.flatten()
    assert torch.equal(labels[matrices.chosen].int(), batch.labels[:count])
    assert torch.equal(matrices.chosen, (labels != -100).nonzero().flatten())
    inputs = matrices.inputs.flatten()[matrices.chosen]
    assert torch.equal(inputs.int(), batch.masked_inputs[:count])
    assert (matrices.inputs != matrices.tokens).sum() == (inputs != labels[matrices.chosen]).sum()


def test_what_is_attended_is_counted(tmp_path):
    assert workload("full", tmp_path).attended().data.max_length == 32
    ragged = workload("ragged", tmp_path)
    longest = first_batch(ragged).cu_seqlens.diff().max()
    assert longest > ragged.attended().data.max_length > 16


@pytest.mark.parametrize("lengths", ["full", "ragged"])
@pytest.mark.parametrize("style", [Style(), Style(gathers=True)])
def test_losses_are_ours(lengths, style, tmp_path):
    work = workload(lengths, tmp_path)
    torch.manual_seed(0)
    ours = Electra(work.config.model, work.vocab_size, work.config.objective)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        ours.generator.head.output_bias[7] = 50  # whatever is drawn, it is this token
    pair = Pair(work, style)
    pair.load(dict(ours.named_parameters()))
    batch = first_batch(work)
    total, metrics = ours(batch)
    peers_total, mlm_loss, disc_loss = pair(padded(batch))
    chosen, tokens = batch.totals
    torch.testing.assert_close(mlm_loss, metrics["mlm_loss"] / chosen)
    torch.testing.assert_close(disc_loss, metrics["disc_loss"] / tokens)
    torch.testing.assert_close(peers_total, total)


def test_tables_are_shared(tmp_path):
    work = workload("full", tmp_path)
    count = sum(parameter.numel() for parameter in Pair(work, Style()).parameters())
    ours = Electra(work.config.model, work.vocab_size, work.config.objective)
    assert count == sum(parameter.numel() for parameter in ours.parameters())
