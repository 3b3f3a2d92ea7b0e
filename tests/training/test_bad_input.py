"""What a user can get wrong: one clear line each, before anything is written."""

import json
import resource
import socket
import sys
from pathlib import Path

import pytest
import torch
from fastelectra.kernels import dispatch
from launching import tiny_config

from fastelectra import cli
from fastelectra.config import config_from_dict
from fastelectra.data.shards import open_corpus
from fastelectra.errors import FastElectraError
from fastelectra.model.electra import Electra
from fastelectra.training import checkpoint, engine, launch
from fastelectra.training.engine import plan_engine, start_engine
from fastelectra.training.launch import Process
from fastelectra.training.loop import Trainer
from fastelectra.training.report import check_outputs
from fastelectra.training.resume import Start, find_start, load_weights

ALONE = Process(rank=0, world=1)


def config_with(corpus, run="run", deepspeed=None, **sections):
    values = tiny_config(corpus, run)
    for section, fields in sections.items():
        values[section] = values.get(section, {}) | fields
    return config_from_dict({**values, "deepspeed": deepspeed or {}})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"zero_optimisation": {}}, "deepspeed.zero_optimisation; did you mean zero_optimization?"),
        ({"zero_optimization": {"stge": 2}}, "deepspeed.zero_optimization.stge; did you mean stag"),
        ({"zero_optimization": {"stage": 4}}, "deepspeed.zero_optimization.stage: Input should be"),
        ({"zero_optimization": {"offload_optimizer": {"device": "disk"}}},
         "deepspeed.zero_optimization.offload_optimizer.device: Input should be"),
        ({"bf16": {"enabled": "auto"}}, 'deepspeed.bf16: DeepSpeed does not understand "auto"'),
        ({"bf16": {"enabled": "yess"}}, "deepspeed.bf16.enabled: Input should be a valid boolean"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "be simultaneously enabled"),
        ({"zero_optimization": True}, "deepspeed.zero_optimization must be an object, got true"),
        ({"bf16": None}, "deepspeed.bf16 must be an object, got null"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "norm: a step whose"),
        ({"torch_autocast": {"enabled": True}}, "it is set by deepspeed.bf16"),
        ({"data_types": 2}, "deepspeed.data_types is not of the type"),
        ({"nebula": {}}, "deepspeed.nebula: Nebula checkpointing has been removed"),
        ({"gradient_clipping": "1"}, "deepspeed.gradient_clipping must be a number"),
        ({"gradient_clipping": float("nan")}, "deepspeed.gradient_clipping must be a number"),
        ({"train_batch_size": 8}, "it is set by training.batch_tokens"),
        ({"train_micro_batch_size_per_gpu": 8}, "it is set by training.micro_batch_tokens"),
        ({"optimizer": {"type": "AdamW"}}, "it is set by the optimizer section"),
        ({"scheduler": {"type": "WarmupLR"}}, "it is set by optimizer.peak_lr"),
        ({"tensor_parallel": {"autotp_size": 2}}, "only shares batches among processes"),
        ({"sequence_parallel_size": 2}, "only shares batches among processes"),
        ({"gradient_accumulation_steps": 4}, "it is set by training.batch_tokens and micro_b"),
    ],
)  # fmt: skip
def test_the_deepspeed_section_is_checked(corpus, section, message):
    with pytest.raises(FastElectraError) as caught:
        plan_engine(config_with(corpus, deepspeed=section), ALONE)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_triton_kernels_without_triton(corpus, monkeypatch):
    monkeypatch.setattr(dispatch, "triton", None)
    plan_engine(config_with(corpus), ALONE)
    with pytest.raises(FastElectraError, match=r"training\.kernels is triton: pip install triton"):
        plan_engine(config_with(corpus, training={"kernels": "triton"}), ALONE)


def test_what_deepspeed_refuses_when_it_starts(corpus, monkeypatch):
    def initialize(**_):
        raise ValueError("This op had not been implemented on CPU backend.")

    monkeypatch.setattr("deepspeed.init_distributed", lambda **_: None)
    monkeypatch.setattr("deepspeed.initialize", initialize)
    config = config_with(corpus, deepspeed={"zero_optimization": {"zero_quantized_weights": True}})
    model = Electra(config.model, 1000, config.objective)
    with pytest.raises(FastElectraError, match=r"cannot do what deepspeed asks.*CPU backend"):
        start_engine(model, config, plan_engine(config, ALONE))


def test_the_deepspeed_section_is_passed_on_and_completed(corpus):
    asked = {
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True},
        "wall_clock_breakdown": False,
    }
    plan = plan_engine(config_with(corpus, deepspeed=asked), ALONE)
    assert {key: plan.section[key] for key in asked if key != "zero_optimization"} == {
        key: value for key, value in asked.items() if key != "zero_optimization"
    }
    assert plan.section["zero_optimization"] == {
        "stage": 3, "offload_optimizer": {"device": "cpu"}, "memory_efficient_linear": False
    }  # fmt: skip
    assert (plan.precision, plan.why, plan.stage, plan.accumulation) == ("bf16", "as asked", 3, 2)
    unasked = plan_engine(config_with(corpus), ALONE)
    assert (unasked.precision, unasked.why) in (
        ("fp32", "this CPU has no fast bf16"), ("bf16", "this CPU is fast at it")
    )  # fmt: skip
    plain = plan_engine(config_with(corpus, deepspeed={"bf16": {"enabled": False}}), ALONE)
    assert (plain.precision, plain.stage, plain.section["gradient_clipping"]) == ("fp32", 0, 1.0)


def test_a_world_that_cannot_share_the_batch(corpus):
    config = config_with(corpus)
    assert launch.accumulation(config, Process(0, 2)) == 1
    with pytest.raises(FastElectraError, match="4 processes cannot share 2 micro-batches a step"):
        launch.accumulation(config, Process(0, 4))


def test_fp16_without_a_scaled_loss(corpus, monkeypatch):
    monkeypatch.setattr(engine, "_precision", lambda *_: ("fp16", "for this test"))
    fp16 = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    assert plan_engine(config_with(corpus, deepspeed=fp16), ALONE).stage == 1
    fp16["zero_optimization"] = {"stage": 0}
    with pytest.raises(FastElectraError, match="stage 0 DeepSpeed does not scale the loss"):
        plan_engine(config_with(corpus, deepspeed=fp16), ALONE)


def test_a_port_that_another_run_has(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with (
            pytest.raises(FastElectraError, match=f"port {port} is in use.* --master_port"),
            launch.one_voice(ALONE),
        ):
            torch.distributed.TCPStore("127.0.0.1", port, is_master=True)


def _run_out_of_memory(capturing):
    try:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    finally:
        if capturing:  # whose end fails as well
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("capturing", [False, True])
def test_too_little_memory(capturing):
    with (
        pytest.raises(FastElectraError, match=r"memory.* smaller training\.micro_batch_tokens"),
        launch.one_voice(ALONE),
    ):
        _run_out_of_memory(capturing)


def test_outputs_that_cannot_be_written(corpus, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(FastElectraError, match=r"cannot write training\.output_dir .*directory"):
        check_outputs(config_with(corpus, tmp_path / "file" / "run"))
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(FastElectraError, match="wandb is not installed"):
        check_outputs(config_with(corpus, tmp_path, training={"wandb_project": "electra"}))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_one_run_at_a_time_in_a_folder(corpus, trained):
    first, other = (config_with(corpus, trained, training={"steps": s}) for s in (20, 30))
    lock = check_outputs(first)
    with pytest.raises(FastElectraError, match=r"another run is at work in .*/run: wait"):
        check_outputs(other)
    assert json.loads((trained / "config.json").read_text())["training"]["steps"] == 20
    lock.close()
    check_outputs(other).close()


def test_files_that_are_not_of_a_run_are_left_alone(corpus, tmp_path):
    config, mine = config_with(corpus, tmp_path), tmp_path / "config.json"
    mine.write_text("mine")
    with pytest.raises(FastElectraError, match=r"has config\.json, which .* name another folder"):
        check_outputs(config)
    assert (list(tmp_path.iterdir()), mine.read_text()) == ([mine], "mine")
    mine.rename(tmp_path / "log")  # what this run does not write may be there
    for _ in range(2):  # the first ends before its first checkpoint
        check_outputs(config).close()


def test_no_run_folder(corpus, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"data": {"path": str(corpus)}}))
    with pytest.raises(FastElectraError, match=r"training\.output_dir is not set: name the folder"):
        cli.main(["train", "--config", str(tmp_path / "c.json")])


def test_a_run_that_went_on_since_the_start_was_found(trained):
    trainer = Trainer.__new__(Trainer)
    trainer.run, trainer.start = trained, Start(step=5)
    trainer._check_alone()
    trainer.start = Start(step=4)
    with pytest.raises(FastElectraError, match="another run has gone on in"):
        trainer._check_alone()


def test_a_full_disk_leaves_the_old_settings(corpus, tmp_path):
    check_outputs(config_with(corpus, tmp_path)).close()
    before = (tmp_path / "config.json").read_text()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # stands in for a full disk
    try:
        with pytest.raises(FastElectraError, match=r"cannot write training\.output_dir"):
            check_outputs(config_with(corpus, tmp_path, training={"steps": 40}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "config.json").read_text() == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoints",
        "config.json",
        "lock",
    }


@pytest.fixture
def trained(corpus, tmp_path) -> Path:
    """A run folder with a checkpoint of step 5."""
    opened, config = open_corpus(corpus), config_with(corpus, tmp_path / "run")
    model = Electra(config.model, opened.vocab_size, config.objective)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    checkpoint.write_checkpoint(
        checkpoint.checkpoint_folder(tmp_path / "run", 5), weights, opened.tokenizer_dir, step=5,
        position={"epoch": 0, "shard": 0, "batch": 10}, config=config.to_dict(),
        vocab_size=opened.vocab_size, special_tokens={}, fingerprint=opened.fingerprint,
    )  # fmt: skip
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "layers", 3),
        ("model", "dropout", 0.2),
        ("data", "mask_fraction", 0.25),
        ("training", "seed", 1),
        ("training", "micro_batch_tokens", 200),
    ],
)
def test_what_a_resumed_run_may_not_change(corpus, trained, section, field, value):
    with pytest.raises(FastElectraError, match=rf"{section}\.{field} = .*, now it is {value}"):
        find_start(config_with(corpus, trained, **{section: {field: value}}), open_corpus(corpus))


def test_what_a_resumed_run_may_change_is_told(corpus, trained):
    config = config_with(
        corpus, trained, optimizer={"peak_lr": 1e-4}, training={"steps": 40, "batch_tokens": 1600}
    )
    start = find_start(config, open_corpus(corpus))
    assert (start.step, start.position.batch, start.resumes) == (5, 10, True)
    assert start.notes[1:] == (
        "changed: optimizer.peak_lr from 0.002 to 0.0001",
        "changed: training.steps from 20 to 40",
        "changed: training.batch_tokens from 800 to 1600",
    )


def test_data_of_a_tokenizer_that_only_lowers_case(corpus, trained, tmp_path):
    text, other = Path(__file__).parents[1] / "texts/washington.txt", tmp_path / "other"
    vocabulary = corpus / "tokenizer/vocab.txt"
    arguments = ["prepare", str(text), "--out", str(other), "--vocab", str(vocabulary), "--cased"]
    assert cli.main([*arguments, "--workers", "1"]) == 0
    fresh = {"init_from": str(trained), "output_dir": str(tmp_path / "new")}
    with pytest.raises(FastElectraError, match="was prepared with another tokenizer"):
        find_start(config_with(other, training=fresh), open_corpus(other))


def test_data_of_another_tokenizer(corpus, trained, tmp_path):
    text, other = Path(__file__).parents[1] / "texts/washington.txt", tmp_path / "other"
    arguments = ["prepare", str(text), "--out", str(other), "--vocab-size", "1000", "--cased"]
    assert cli.main([*arguments, "--workers", "1"]) == 0
    with pytest.raises(FastElectraError, match="was prepared with another tokenizer"):
        find_start(config_with(other, trained), open_corpus(other))

    fresh = {"init_from": str(trained), "output_dir": str(tmp_path / "new")}
    find_start(config_with(corpus, training=fresh), open_corpus(corpus))
    with pytest.raises(
        FastElectraError, match=r"another tokenizer than .*--vocab .*tokenizer\.json"
    ):
        find_start(config_with(other, training=fresh), open_corpus(other))


def test_weights_that_do_not_fit(corpus, trained, tmp_path):
    folder, config = checkpoint.resolve(trained), config_with(corpus)
    torch.manual_seed(1)
    model = Electra(config.model, 1000, config.objective)
    weights = load_weights(model, folder)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    config.model.embedding_size = 24
    other = Electra(config.model, 1000, config.objective)
    with pytest.raises(
        FastElectraError, match=r"does not fit the model .*\[32, 16\] there and \[32, 24\]"
    ):
        load_weights(other, folder)
    config = config_with(corpus, training={"init_from": str(tmp_path), "output_dir": "none"})
    with pytest.raises(FastElectraError, match="no checkpoint in"):
        find_start(config, open_corpus(corpus))


def test_a_start_from_another_model_names_what_to_set(corpus, trained):
    def start(objective, **model):
        fresh = {"init_from": str(trained), "output_dir": "none"}
        sections = {"training": fresh, "objective": {"name": objective}, "model": model}
        return find_start(config_with(corpus, **sections), open_corpus(corpus))

    assert start("electra_15", dropout=0.2, generator_fraction=0.501).folder  # of the same sizes
    needed = "--set objective.name=electra --set model.heads=2 --set model.generator_fraction=0.5"
    with pytest.raises(FastElectraError, match=f"start with {needed}$"):
        start("mlm", heads=4, generator_fraction=0.25)
