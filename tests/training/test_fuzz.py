"""Files that are damaged, or made to do harm: only the project's own error comes out."""

import contextlib
import copy
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launching import tiny_config
from safetensors.torch import load_file

from fastelectra import cli
from fastelectra.config import config_from_dict, load_config
from fastelectra.data.shards import open_corpus
from fastelectra.errors import FastElectraError
from fastelectra.model.electra import Electra
from fastelectra.model.hub_reader import read_networks
from fastelectra.training import checkpoint, resume

INPUTS = int(os.environ.get("FASTELECTRA_FUZZ", "150"))  # to each test
fuzzed = settings(
    max_examples=INPUTS, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
values = st.recursive(plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v))


@st.composite
def mutated_json(draw, original):
    """A JSON value with some part replaced or removed, or a key added."""
    tree = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while True:
            key = draw(st.sampled_from(sorted(node)))
            if not (isinstance(node[key], dict) and node[key] and draw(st.booleans())):
                break
            node = node[key]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace" or len(node) == 1:
            node[key] = draw(values)
        elif action == "remove":
            del node[key]
        else:
            node[draw(st.text(max_size=9))] = draw(values)
    return tree


@st.composite
def mutated_bytes(draw, original: bytes):
    """A file cut short, with bytes changed, put in, or of nothing but noise; never the original."""
    place = draw(st.integers(0, max(0, len(original) - 1)))
    noise = draw(st.binary(min_size=1, max_size=40))
    kind = draw(st.sampled_from(["cut", "change", "insert", "noise"]))
    damaged = {
        "cut": original[:place],
        "change": original[:place] + noise + original[place + len(noise) :],
        "insert": original[:place] + noise + original[place:],
        "noise": noise,
    }[kind]
    return damaged if damaged != original else original + noise


@pytest.fixture(scope="module")
def sound(corpus, tmp_path_factory) -> Path:
    """A run folder with a checkpoint, moments included."""
    run = tmp_path_factory.mktemp("sound") / "run"
    opened, config = open_corpus(corpus), config_from_dict(tiny_config(corpus, run))
    torch.manual_seed(0)
    model = Electra(config.model, opened.vocab_size, config.objective)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {f"{name}.{key}": w.abs() for name, w in weights.items()
               for key in ("exp_avg", "exp_avg_sq")}  # fmt: skip
    state = {"step": 5, "position": {"epoch": 0, "shard": 0, "batch": 10},
             "config": config.to_dict(), "vocab_size": opened.vocab_size, "special_tokens": {},
             "fingerprint": opened.fingerprint, "skipped": 0,
             "loss_scale": {"cur_scale": 256.0, "cur_iter": 3}}  # fmt: skip
    with checkpoint.write_folder(checkpoint.checkpoint_folder(run, 5)) as folder:
        checkpoint.write_share(folder, weights, moments)
        checkpoint.write_rest(folder, opened.tokenizer_dir, state)
    return run


def load(run: Path, corpus: Path) -> None:
    """All that resuming reads."""
    opened, config = open_corpus(corpus), config_from_dict(tiny_config(corpus, run))
    start = resume.find_start(config, opened)
    model = Electra(config.model, opened.vocab_size, config.objective)
    resume.load_weights(model, start.folder)
    resume.load_moments(model, start.folder)


NAMES = ["model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS",
         "tokenizer/vocab.txt"]  # fmt: skip


@fuzzed
@given(data=st.data())
def test_any_damage_to_a_checkpoint_is_noticed(corpus, sound, tmp_path, data):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    folder = shutil.copytree(sound, run) / "checkpoints" / "step-00000005"
    load(run, corpus)
    path = folder / data.draw(st.sampled_from(NAMES))
    path.write_bytes(data.draw(mutated_bytes(path.read_bytes())))
    if path.name == checkpoint.SUMS and not checkpoint_differs(folder):
        return  # only white space, or a line twice
    with pytest.raises(FastElectraError, match="damaged"):
        load(run, corpus)


def checkpoint_differs(folder: Path) -> bool:
    """Whether a line of the checksums, as sha256sum reads it, is wrong or missing."""
    try:
        checkpoint.verify(folder)
    except FastElectraError:
        return True
    return False


@fuzzed
@given(data=st.data())
def test_a_forged_checkpoint_gives_our_error_or_loads(corpus, sound, tmp_path, data):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    folder = shutil.copytree(sound, run) / "checkpoints" / "step-00000005"
    path = folder / data.draw(st.sampled_from(NAMES[:3]))
    if path.name == checkpoint.STATE:
        state = json.loads(path.read_text())
        path.write_text(json.dumps(data.draw(mutated_json(state))))
    else:
        path.write_bytes(data.draw(mutated_bytes(path.read_bytes())))
    checkpoint.write_sums(folder)  # as someone who means harm would
    with contextlib.suppress(FastElectraError):
        load(run, corpus)


def test_names_in_a_checkpoint_do_not_leave_it(sound, tmp_path):
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"x")
    folder = shutil.copytree(sound, tmp_path / "run") / "checkpoints" / "step-00000005"
    sums = folder / checkpoint.SUMS
    for name in ("../../../secret.safetensors", str(secret)):
        digest = hashlib.sha256(b"x").hexdigest()
        sums.write_text(f"{sums.read_text()}{digest}  {name}\n")
        with pytest.raises(FastElectraError, match="lacks"):
            checkpoint.verify(folder)


@pytest.fixture(scope="module")
def downloaded(sound, tmp_path_factory) -> Path:
    """A Hugging Face folder, with its weights as safetensors and as torch writes them."""
    out = tmp_path_factory.mktemp("hub") / "export"
    assert cli.main(["export", str(sound), str(out)]) == 0
    folder = out / "discriminator"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


@fuzzed
@given(data=st.data())
def test_a_downloaded_model_of_any_bytes(downloaded, tmp_path, data):
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(downloaded, folder)
    path = folder / data.draw(
        st.sampled_from(["config.json", "model.safetensors", "pytorch_model.bin"])
    )
    if path.suffix == ".json" and data.draw(st.booleans()):
        path.write_text(json.dumps(data.draw(mutated_json(json.loads(path.read_text())))))
    else:
        path.write_bytes(data.draw(mutated_bytes(path.read_bytes())))
    if path.suffix == ".bin":
        (folder / "model.safetensors").unlink()
    with contextlib.suppress(FastElectraError):
        read_networks([folder])


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "", "..", 7])
def test_an_index_of_weights_does_not_leave_its_folder(downloaded, tmp_path, name):
    folder = shutil.copytree(downloaded, tmp_path / "model")
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FastElectraError, match="weight_map must name files in the same folder"):
        read_networks([folder])


@fuzzed
@given(data=st.data())
def test_a_config_of_any_bytes(corpus, tmp_path, data):
    original = json.dumps(tiny_config(corpus, "run")).encode()
    (tmp_path / "config.json").write_bytes(data.draw(mutated_bytes(original)))
    read_config(tmp_path / "config.json", [])


@fuzzed
@given(tree=mutated_json(tiny_config(Path("corpus"), Path("run"))), override=st.text(max_size=30))
def test_a_config_of_any_values(tmp_path, tree, override):
    (tmp_path / "config.json").write_text(json.dumps(tree))
    read_config(tmp_path / "config.json", [])
    read_config(tmp_path / "config.json", [override, f"training.steps={override}"])


def read_config(path: Path, overrides: list[str]) -> None:
    with contextlib.suppress(FastElectraError):
        load_config(path, overrides)
