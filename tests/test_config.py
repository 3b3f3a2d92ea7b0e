"""The configuration is strict: what is not understood is an error that helps."""

import json
from pathlib import Path

import pytest

from fastelectra.config import Config, config_from_dict, generator_sizes, load_config
from fastelectra.errors import FastElectraError

CONFIGS = Path(__file__).parent.parent / "configs"
PAPER = {  # table 6: layers, hidden, FFN, heads, embedding, generator (hidden, FFN, heads),
    # length, mask share, tokens a step, steps, peak learning rate
    "small": (12, 256, 1024, 4, 128, (64, 256, 1), 128, 0.15, 128 * 128, 1_000_000, 5e-4),
    "base": (12, 768, 3072, 12, 768, (256, 1024, 4), 512, 0.15, 256 * 512, 766_000, 2e-4),
    "large": (24, 1024, 4096, 16, 1024, (256, 1024, 4), 512, 0.25, 2048 * 512, 400_000, 2e-4),
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers(name):
    config = load_config(CONFIGS / f"{name}.json")
    model, data, training = config.model, config.data, config.training
    assert (
        model.layers, model.hidden_size, model.intermediate_size, model.heads,
        model.embedding_size, generator_sizes(model), data.max_length, data.mask_fraction,
        training.batch_tokens, training.steps, config.optimizer.peak_lr,
    ) == PAPER[name]  # fmt: skip
    assert (model.dropout, model.attention_dropout, model.max_positions) == (0.1, 0.1, 512)
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.999, 1e-6)
    assert (optimizer.weight_decay, optimizer.warmup_steps) == (0.01, 10_000)
    assert not optimizer.bias_correction


def test_every_shipped_config_loads_and_round_trips():
    paths = sorted(CONFIGS.glob("*.json"))
    assert {path.stem for path in paths} >= {"demo", "small", "base", "large"}
    for path in paths:
        config = load_config(path)
        assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_overrides_are_typed(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    config = load_config(
        path,
        ["training.steps=1e3", "data.path=my corpus", "optimizer.peak_lr=1",
         "data.mask_fraction=.2", "training.output_dir=5", 'training.wandb_project="a b"',
         "data.google_parity=true", "deepspeed.zero_optimization.stage=2",
         "deepspeed.tensorboard.job_name=007"],
    )  # fmt: skip
    assert config.training.steps == 1000
    assert isinstance(config.training.steps, int)
    assert config.data.path == "my corpus"
    assert (config.data.mask_fraction, config.training.output_dir) == (0.2, "5")
    assert config.training.wandb_project == "a b"
    assert config.optimizer.peak_lr == 1.0
    assert isinstance(config.optimizer.peak_lr, float)
    assert config.data.google_parity is True
    assert config.deepspeed == {
        "zero_optimization": {"stage": 2}, "tensorboard": {"job_name": "007"}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": {"hiden_size": 5}}, "did you mean model.hidden_size?"),
        ({"modle": {}}, "did you mean model?"),
        ({"optimizer": {"warmup": 5}}, "did you mean optimizer.warmup_steps?"),
        ({"training": {"peak_lr": 1e-3}}, "did you mean optimizer.peak_lr?"),
        ({"model": {"zzz": 5}}, "valid here: layers"),
        ({"model": {"layers": "12"}}, 'model.layers must be an integer, got "12"'),
        ({"model": {"layers": True}}, "model.layers must be an integer, got true"),
        ({"model": {"layers": 1.5}}, "model.layers must be an integer, got 1.5"),
        ({"model": {"layers": None}}, "model.layers must be an integer, got null"),
        ({"model": 3}, "model must be an object"),
        ({"model": {"heads": 3}}, "does not divide hidden_size"),
        ({"model": {"generator_fraction": 0.3, "hidden_size": 64, "heads": 8}}, "generator"),
        ({"model": {"dropout": 1.0}}, "model.dropout must be in [0, 1)"),
        ({"data": {"max_length": 1024}}, "model.max_positions"),
        ({"data": {"mask_fraction": 0}}, "mask_fraction"),
        ({"training": {"batch_tokens": 100, "micro_batch_tokens": 1000}}, "not a multiple"),
        ({"training": {"micro_batch_tokens": 16, "batch_tokens": 16}}, "not one example"),
        ({"training": {"kernels": "cuda"}}, "auto, triton or torch"),
        (
            {"objective": {"name": "bert"}},
            "must be electra, electra_15, replace_mlm, all_tokens_mlm or mlm, got 'bert'",
        ),
        ({"objective": {"name": "replace-mlm"}}, "did you mean replace_mlm?"),
        ({"model": {"embedding_sharing": "token"}}, "all, tokens or none, got 'token'; did you"),
        ({"objective": {"name": "mlm", "disallow_correct": True}}, "trains no generator"),
        (
            {"objective": {"name": "mlm"}, "model": {"embedding_sharing": "none"}},
            "trains no generator",
        ),
        ({"objective": {"name": "electra_15", "disallow_correct": True}}, "is a fake"),
        ({"training": {"steps": 0}}, "training.steps must be above 0 and below"),
        ({"optimizer": {"peak_lr": float("nan")}}, "optimizer.peak_lr must be above 0"),
        ({"optimizer": {"peak_lr": 10**400}}, "optimizer.peak_lr must be above 0 and below inf"),
    ],
)
def test_bad_values_name_the_field(values, said):
    with pytest.raises(FastElectraError) as error:
        config_from_dict(values, "my.json")
    assert said in str(error.value)
    assert "my.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"{", "not valid JSON"), (b"[]", "expected an object"), (b"\xff\xfe", "not UTF-8"),
     (b'{"data": {}, "model": {}, "data": {}}', "'data' is there twice"),
     (b"[" * 100_000, "not valid JSON"), (b'{"a": %s}' % (b"9" * 5000), "not valid JSON")],
)  # fmt: skip
def test_bad_files_are_one_line(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(FastElectraError, match=said):
        load_config(path)


def test_paths_at_home_and_a_byte_order_mark(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = tmp_path / "config.json"
    path.write_text('{"data": {"path": "~/corpus"}}', encoding="utf-8-sig")
    config = load_config(path, ["training.output_dir=~/runs/x"])
    assert config.data.path == "/home/me/corpus"
    assert config.training.output_dir == "/home/me/runs/x"
    assert config.training.init_from == ""


@pytest.mark.parametrize("override", ["steps", "training.steps", "=1", "training.=1", "a=1"])
def test_bad_overrides(tmp_path, override):
    path = tmp_path / "config.json"
    path.write_text("{}")
    with pytest.raises(FastElectraError, match=r"section\.field=value"):
        load_config(path, [override])


def test_missing_file_is_named():
    with pytest.raises(FastElectraError, match=r"no/such\.json"):
        load_config("no/such.json")


def test_defaults_are_electra_small():
    small = load_config(CONFIGS / "small.json")
    assert small.model == Config().model
    assert small.optimizer == Config().optimizer
