"""Export to and import from Hugging Face, with transformers on the other side."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from checkpoints import ODD, change_json, fastelectra, files, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    pipeline,
)

from fastelectra.config import ModelConfig, load_config
from fastelectra.data.batch import Batch
from fastelectra.data.shards import open_corpus
from fastelectra.errors import FastElectraError
from fastelectra.explain import explain
from fastelectra.hub import load_pretrained
from fastelectra.model import electra as electra_module
from fastelectra.training import checkpoint
from fastelectra.training.resume import find_start

SMALL = replace(ModelConfig(), layers=2)
BIASED = replace(ODD, embedding_size=24, generator_fraction=0.3333, hidden_size=24, heads=3)
SENTENCES = ["the people of the united states", "fellow citizens of the senate", "war"]


pytestmark = pytest.mark.usefixtures("one_thread")


def packed(inputs):
    """A tokenizer's padded output as a packed Batch with every [MASK] chosen."""
    lengths = inputs["attention_mask"].sum(1)
    real = inputs["attention_mask"].bool()
    tokens = inputs["input_ids"][real].int()
    masked = (tokens == 4).nonzero()[:, 0].int()
    return Batch(
        tokens=tokens,
        segments=inputs["token_type_ids"][real].int(),
        positions=torch.cat([torch.arange(length) for length in lengths]).int(),
        cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        masked_positions=masked,
        masked_inputs=tokens[masked],
        labels=tokens[masked],
        uniforms=torch.zeros(len(masked)),
        totals=torch.ones(2),
        max_length=int(lengths.max()),
        seed=0,
    )


@pytest.mark.parametrize("model", [ODD, BIASED, SMALL], ids=["odd", "thirds", "small"])
def test_transformers_loads_an_export_and_computes_the_same(tmp_path, corpus, model):
    ours = write_checkpoint(tmp_path / "checkpoint", corpus, model)
    assert fastelectra("export", tmp_path / "checkpoint", tmp_path / "out") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/discriminator")
    state = checkpoint.read_state(tmp_path / "checkpoint")
    assert tokenizer.model_max_length == state["config"]["data"]["max_length"]
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    batch, real = packed(inputs), inputs["attention_mask"].bool()
    vocabulary = load_pretrained(tmp_path / "checkpoint").tokenizer
    assert [vocabulary.encode(text).ids for text in SENTENCES] == [
        ids[mask].tolist() for ids, mask in zip(inputs["input_ids"], real, strict=True)
    ]

    discriminator, info = ElectraForPreTraining.from_pretrained(
        tmp_path / "out/discriminator", output_loading_info=True
    )
    assert not any(info.values())
    with torch.no_grad():
        logits = discriminator(**inputs).logits[real]
        hidden = AutoModel.from_pretrained(tmp_path / "out/discriminator")(**inputs)[0][real]
        expected = discriminator.electra(**inputs)[0][real]
    torch.testing.assert_close(ours.discriminator_logits(batch), logits, atol=1e-5, rtol=0)
    assert torch.equal(hidden, expected)

    sentences = [f"{text} {tokenizer.mask_token}" for text in SENTENCES]
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    generator, info = ElectraForMaskedLM.from_pretrained(
        tmp_path / "out/generator", output_loading_info=True
    )
    assert not any(info.values())
    with torch.no_grad():
        logits = generator(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id]
    predicted = ours.generator_logits(packed(inputs))
    torch.testing.assert_close(predicted, logits, atol=1e-5, rtol=0)
    fill = pipeline("fill-mask", model=str(tmp_path / "out/generator"))
    for answers, row in zip(fill(sentences, top_k=3), predicted.softmax(1), strict=True):
        best = row.topk(3)
        assert [answer["token"] for answer in answers] == best.indices.tolist()
        assert [answer["score"] for answer in answers] == pytest.approx(
            best.values.tolist(), rel=1e-4
        )
    assert fill("[MASK] war" * 300, tokenizer_kwargs={"truncation": True})


@pytest.mark.parametrize("objective", ["mlm", "replace_mlm", "all_tokens_mlm"])
def test_a_main_network_that_predicts_tokens_is_a_masked_lm(tmp_path, corpus, objective, capsys):
    ours = write_checkpoint(tmp_path / "checkpoint", corpus, objective=objective)
    assert fastelectra("export", tmp_path / "checkpoint", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert ("the probability of copying" in told) == (objective == "all_tokens_mlm")
    parts = {path.name for path in (tmp_path / "out").iterdir()}
    assert parts == {"mlm"} | ({"generator"} if objective != "mlm" else set())
    model, info = ElectraForMaskedLM.from_pretrained(tmp_path / "out/mlm", output_loading_info=True)
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/mlm")
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    hidden = []
    ours.discriminator.register_forward_hook(lambda *call: hidden.append(call[2]))
    with torch.no_grad():
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        ours._discriminate(
            packed(inputs).tokens, packed(inputs), electra_module._layout(packed(inputs)),
            torch.zeros(4, dtype=torch.int64),
        )  # fmt: skip
        torch.testing.assert_close(
            ours.discriminator.head.logits(hidden[0]), logits, atol=1e-5, rtol=0
        )
    loaded = load_pretrained(tmp_path / "checkpoint")
    assert loaded.has_generator == (objective != "mlm")
    assert loaded.electra.objective.name == objective
    with pytest.raises(FastElectraError, match=f"the main network of {objective} predicts tokens"):
        explain(loaded, "the war")
    for command in ("import", "--out", tmp_path / "imported"), ("explain", "the war", "--model"):
        capsys.readouterr()
        assert fastelectra(*command, tmp_path / "out") == 2
        assert "out/mlm, predicts tokens. Use that part" in capsys.readouterr().err


@pytest.mark.parametrize("sharing", ["tokens", "none"])
def test_networks_with_embeddings_of_their_own(tmp_path, corpus, sharing):
    model = replace(ODD, embedding_sharing=sharing)
    ours = write_checkpoint(tmp_path / "checkpoint", corpus, model)
    assert fastelectra("export", tmp_path / "checkpoint", tmp_path / "out") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/generator")
    inputs = tokenizer("the war [MASK]", return_tensors="pt")
    with torch.no_grad():
        generator = ElectraForMaskedLM.from_pretrained(tmp_path / "out/generator")
        logits = generator(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id]
        discriminator = ElectraForPreTraining.from_pretrained(tmp_path / "out/discriminator")
        scores = discriminator(**inputs).logits[0]
    torch.testing.assert_close(ours.generator_logits(packed(inputs)), logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.discriminator_logits(packed(inputs)), scores, atol=1e-5, rtol=0)
    again = load_pretrained(tmp_path / "checkpoint").electra
    batch = packed(inputs)
    assert torch.equal(again.generator_logits(batch), ours.generator_logits(batch))


def test_a_training_starts_with_what_import_says(tmp_path, corpus, exported, capsys):
    assert fastelectra("import", exported, "--out", tmp_path / "imported") == 0
    said = capsys.readouterr().out.partition("start with --set ")[2].split()[::2]
    demo = Path(__file__).parents[1] / "configs/demo.json"
    config = load_config(demo, [*said, f"training.output_dir={tmp_path / 'run'}"])
    assert find_start(config, open_corpus(corpus)).folder == tmp_path / "imported"


def test_a_run_folder_exports_its_newest_checkpoint(tmp_path, corpus):
    for step in (10, 200):
        write_checkpoint(checkpoint.checkpoint_folder(tmp_path / "run", step), corpus, step=step)
    newest = checkpoint.checkpoint_folder(tmp_path / "run", 200)
    assert fastelectra("export", tmp_path / "run", tmp_path / "one") == 0
    assert fastelectra("export", newest, tmp_path / "two") == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_export_of_a_checkpoint_that_its_run_removes_meanwhile(tmp_path, corpus, monkeypatch):
    run, saved = tmp_path / "run", []
    write_checkpoint(checkpoint.checkpoint_folder(run, 10), corpus, step=10)

    def save(tensors, path, *others):
        if not saved:
            write_checkpoint(checkpoint.checkpoint_folder(run, 20), corpus, step=20)
            checkpoint.tidy(run, keep_last=1)
        saved.append(path)
        save_file(tensors, path, *others)

    monkeypatch.setattr("fastelectra.hub.save_file", save)
    assert fastelectra("export", run, tmp_path / "out") == 0
    for part in ("discriminator", "generator"):
        assert (tmp_path / "out" / part / "tokenizer.json").is_file()


def test_import_and_export_give_back_the_same_bytes(tmp_path, corpus, exported):
    assert fastelectra("import", exported, "--out", tmp_path / "imported") == 0
    assert fastelectra("export", tmp_path / "imported", tmp_path / "again") == 0
    assert files(tmp_path / "again") == files(exported)
    assert len(files(exported)) == 10
    separate = [exported / "generator", exported / "discriminator"]
    assert fastelectra("import", *separate, "--out", tmp_path / "separate") == 0
    assert files(tmp_path / "separate") == files(tmp_path / "imported")
    state = checkpoint.read_state(tmp_path / "imported")
    assert (state["step"], state["position"]) == (0, None)
    assert state["special_tokens"] == open_corpus(corpus).manifest.special_tokens


def test_the_length_of_training_goes_along(tmp_path, exported):
    shutil.copytree(exported, tmp_path / "cut")
    change_json(tmp_path / "cut/discriminator/tokenizer_config.json", model_max_length=7)
    assert fastelectra("import", tmp_path / "cut", "--out", tmp_path / "imported") == 0
    assert fastelectra("export", tmp_path / "imported", tmp_path / "again") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again/discriminator")
    assert tokenizer.model_max_length == 7


def save_pair(folder, corpus, **options):
    """Both networks as transformers makes and saves them, each with embeddings of its own."""
    torch.manual_seed(1)
    sizes = {
        "vocab_size": open_corpus(corpus).vocab_size,
        "embedding_size": 16,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    }
    large = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    half = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(open_corpus(corpus).tokenizer_dir)
    for name, model_class, own in (
        ("discriminator", ElectraForPreTraining, large),
        ("generator", ElectraForMaskedLM, half),
    ):
        model_class(ElectraConfig(**sizes, **own)).save_pretrained(folder / name, **options)
        tokenizer.save_pretrained(folder / name)


@pytest.mark.parametrize("form", ["one file", "shards", "pickle", "half precision"])
def test_what_transformers_saved_survives_import_and_export(tmp_path, corpus, form, capsys):
    pair = tmp_path / "pair"
    save_pair(pair, corpus, **({"max_shard_size": "20KB"} if form == "shards" else {}))
    loaded = {
        "discriminator": ElectraForPreTraining.from_pretrained(pair / "discriminator"),
        "generator": ElectraForMaskedLM.from_pretrained(pair / "generator"),
    }
    for name, model in loaded.items():
        weights = pair / name / "model.safetensors"
        if form == "shards":
            assert len(list((pair / name).glob("model-*.safetensors"))) > 1
        if form == "pickle":
            weights.unlink()
            torch.save(model.state_dict(), pair / name / "pytorch_model.bin")
        if form == "half precision":
            model.half()
            save_file({key: value.half() for key, value in load_file(weights).items()}, weights)
    assert fastelectra("import", *pair.iterdir(), "--out", tmp_path / "imported") == 0
    assert "embeddings differ: took the discriminator's" in capsys.readouterr().out
    load_pretrained(pair)
    assert "embeddings differ: took the discriminator's" in capsys.readouterr().err
    assert fastelectra("export", tmp_path / "imported", tmp_path / "out") == 0
    shared = load_file(tmp_path / "out/discriminator/model.safetensors")
    for name, model in loaded.items():
        tensors = load_file(tmp_path / "out" / name / "model.safetensors")
        named = dict(model.named_parameters())
        assert tensors.keys() == named.keys()
        for key, tensor in tensors.items():
            embedding = key.startswith("electra.embeddings.")
            expected = shared[key] if embedding else named[key].detach().float()
            assert torch.equal(tensor, expected), key
        again = ElectraConfig.from_pretrained(tmp_path / "out" / name).to_dict()
        differ = {key for key, value in model.config.to_dict().items() if again[key] != value}
        assert differ <= {"dtype", "_name_or_path"}


def test_embeddings_of_no_token_are_left_out(tmp_path, corpus, capsys):
    """As resize_token_embeddings makes them: to a multiple of 64, say."""
    save_pair(tmp_path / "pair", corpus)
    tokens = open_corpus(corpus).vocab_size
    kinds = {"discriminator": ElectraForPreTraining, "generator": ElectraForMaskedLM}
    for folder, kind in kinds.items():
        model = kind.from_pretrained(tmp_path / "pair" / folder)
        model.resize_token_embeddings(tokens + 8)
        model.save_pretrained(tmp_path / "padded" / folder)
        for file in (tmp_path / "pair" / folder).glob("*token*"):
            shutil.copy(file, tmp_path / "padded" / folder)
    for name in ("pair", "padded"):
        parts = [tmp_path / name / part for part in kinds]
        assert fastelectra("import", *parts, "--out", tmp_path / f"{name}-imported") == 0
        said = f"left out: embeddings {tokens} to {tokens + 7}, of no token"
        assert (said in capsys.readouterr().out) == (name == "padded")
    assert files(tmp_path / "padded-imported") == files(tmp_path / "pair-imported")


@pytest.mark.parametrize("given", ["discriminator", "generator"])
def test_a_missing_network_starts_afresh(tmp_path, exported, given, capsys):
    missing = "generator" if given == "discriminator" else "discriminator"
    arguments = ["import", exported / given, "--out", tmp_path / "in", "--generator-fraction", 0.5]
    assert fastelectra(*arguments) == 0
    assert f"{missing}: not given, initialised afresh" in capsys.readouterr().out
    weights = checkpoint.read_weights(tmp_path / "in")
    before = checkpoint.read_weights(tmp_path / "checkpoint")
    assert weights.keys() == before.keys()
    for name, tensor in weights.items():
        fresh = name.startswith(missing)
        assert torch.equal(tensor, before[name]) is not fresh, name
        if fresh and tensor.ndim == 2:
            assert tensor.abs().max() <= 0.0401
    assert checkpoint.read_state(tmp_path / "in")["config"]["model"] == asdict(ODD)


def test_vocabulary_without_tokenizer_json(tmp_path, exported):
    for part in ("discriminator", "generator"):
        (exported / part / "tokenizer.json").unlink()
    assert fastelectra("import", exported, "--out", tmp_path / "imported") == 0
    after = tmp_path / "imported" / "tokenizer" / "tokenizer.json"
    assert after.read_bytes() == (tmp_path / "checkpoint/tokenizer/tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["do_lower_case", "strip_accents", "tokenize_chinese_chars"])
@pytest.mark.parametrize("value", [True, False])
def test_vocabulary_alone_is_read_as_transformers_does(exported, name, value):
    folder, text = exported / "discriminator", "The Wár 中文 war"
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text(
        "[PAD] [UNK] [CLS] [SEP] [MASK] The Wár the wár war 中 文 中文".replace(" ", "\n")
    )
    change_json(folder / "tokenizer_config.json", **{name: value})
    theirs = AutoTokenizer.from_pretrained(folder)
    assert load_pretrained(folder).tokenizer.encode(text).tokens == theirs.tokenize(
        text, add_special_tokens=True
    )


def test_load_pretrained_takes_every_kind_of_folder(tmp_path, corpus):
    run = tmp_path / "run"
    folder = checkpoint.checkpoint_folder(run, 7)
    network = write_checkpoint(folder, corpus)
    assert fastelectra("export", run, tmp_path / "out") == 0
    alone, generator = tmp_path / "out/discriminator", tmp_path / "out/generator"
    special = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    expected = dict(network.named_parameters())
    for arguments in ([run], [folder], [tmp_path / "out"], [alone, generator], [alone]):
        loaded = load_pretrained(*arguments)
        assert loaded.has_generator is (arguments != [alone])
        assert loaded.special == special
        assert loaded.tokenizer.encode("the war").ids[0] == special["cls"]
        assert not loaded.electra.training
        for name, parameter in loaded.electra.named_parameters():
            if loaded.has_generator or not name.startswith("generator."):
                assert torch.equal(parameter, expected[name]), name
    with pytest.raises(FastElectraError, match="holds no discriminator"):
        load_pretrained(generator)
    with pytest.raises(FastElectraError, match="has a generator of its own"):
        load_pretrained(run, generator)
