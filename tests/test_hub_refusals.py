"""What export and import refuse: one line each, and nothing left behind."""

import errno
import os
from pathlib import Path

import pytest
import torch
from checkpoints import change_json, fastelectra, files
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
)

from fastelectra import hub
from fastelectra.training import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def refused(capsys, *arguments):
    """The one line that a command ends with, having left nothing at the place it should write."""
    out = Path(arguments[-1])
    before = files(out) if out.is_dir() else {}
    assert fastelectra(*arguments) == 2
    assert (files(out) if out.is_dir() else {}) == before
    assert not list(out.parent.glob(".tmp-*"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_export_refuses(tmp_path, corpus, exported, capsys):
    folder, out = tmp_path / "checkpoint", tmp_path / "new"
    assert "no checkpoint in" in refused(capsys, "export", tmp_path / "nowhere", out)
    assert "already exists" in refused(capsys, "export", folder, exported)
    (tmp_path / "file").touch()
    line = refused(capsys, "export", folder, tmp_path / "file" / "out")
    assert "cannot write" in line
    assert "Not a directory" in line

    change_tensors(folder, lambda tensors: tensors.pop("embeddings.word"))
    checkpoint.write_sums(folder)
    assert "model.safetensors and state.json disagree" in refused(capsys, "export", folder, out)
    (folder / "model.safetensors").write_bytes(b"cut")
    assert "does not match its checksum" in refused(capsys, "export", folder, out)
    checkpoint.write_sums(folder)
    assert "cannot read" in refused(capsys, "export", folder, out)
    (folder / "state.json").write_text('{"format": 1}')
    checkpoint.write_sums(folder)
    assert "state.json lacks step" in refused(capsys, "export", folder, out)


@pytest.mark.parametrize("tensors", [False, True])
def test_export_to_a_full_disk(tmp_path, exported, capsys, monkeypatch, tensors):
    reason = os.strerror(errno.ENOSPC)

    def fail(*_, **__):
        if tensors:  # as safetensors tells it
            raise SafetensorError(f"Error while serializing: I/O error: {reason} (os error 28)")
        raise OSError(errno.ENOSPC, reason)

    if tensors:
        monkeypatch.setattr(hub, "save_file", fail)
    else:
        monkeypatch.setattr(Path, "write_text", fail)
    line = refused(capsys, "export", tmp_path / "checkpoint", tmp_path / "new")
    assert f"{tmp_path / 'new'}: {reason}" in line


def test_import_refuses_folders_that_are_no_electra(tmp_path, exported, capsys):
    out = tmp_path / "new"
    discriminator, generator = exported / "discriminator", exported / "generator"
    BertConfig().save_pretrained(tmp_path / "bert")
    for folders, message in (
        ([tmp_path / "nowhere"], "nowhere: no such folder"),
        ([tmp_path / "bert"], "not the configuration of an Electra model"),
        ([discriminator, discriminator], "are both a discriminator"),
    ):
        assert message in refused(capsys, "import", *folders, "--out", out)
    assert "already exists" in refused(capsys, "import", exported, "--out", exported)
    line = refused(capsys, "import", discriminator, "--generator-fraction", "3", "--out", out)
    assert "must be above 0 and at most 1" in line

    (discriminator / "tokenizer.json").unlink()
    settings = discriminator / "tokenizer_config.json"
    change_json(settings, tokenizer_class="BertJapaneseTokenizer")
    line = refused(capsys, "import", discriminator, "--out", out)
    assert "tokenizer_class BertJapaneseTokenizer needs a tokenizer.json" in line
    change_json(settings, tokenizer_class="BertTokenizerFast", tokenize_chinese_chars="no")
    line = refused(capsys, "import", discriminator, "--out", out)
    assert "tokenize_chinese_chars must be true or false, got 'no'" in line
    settings.unlink()
    (discriminator / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    assert "lacks [MASK]" in refused(capsys, "import", discriminator, "--out", out)
    (discriminator / "vocab.txt").unlink()
    assert "has no tokenizer" in refused(capsys, "import", discriminator, "--out", out)
    entries = (generator / "vocab.txt").read_text()
    (generator / "tokenizer.json").unlink()
    (generator / "vocab.txt").write_text(entries + "extraordinary\n")
    assert "more than the model's" in refused(capsys, "import", generator, "--out", out)

    (generator / "model.safetensors").unlink()
    assert "has no weights" in refused(capsys, "import", generator, "--out", out)
    (generator / "pytorch_model.bin").write_bytes(b"no pickle")
    assert "is damaged, or holds more" in refused(capsys, "import", generator, "--out", out)
    (generator / "config.json").write_text("{")
    assert "not valid JSON" in refused(capsys, "import", generator, "--out", out)


def test_a_model_on_the_hub_has_to_be_downloaded(tmp_path, exported, capsys):
    name = "google/electra-small-generator"
    for arguments in (
        ["import", name, "--out", tmp_path / "new"],
        ["explain", "war", "--model", name],
        ["explain", "war", "--model", exported / "discriminator", "--generator", name],
    ):
        assert fastelectra(*arguments) == 2
        said = capsys.readouterr().err
        assert f"hf download {name} --local-dir electra-small-generator" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu', supported is 'gelu'"),
        ({"type_vocab_size": 4}, "type_vocab_size is 4"),
        ({"vocab_size": 77}, "are no pair: vocab_size"),
        ({"num_hidden_layers": 3}, "are no pair: num_hidden_layers"),
        ({"intermediate_size": 44}, "0.5 of the discriminator's would be"),
        ({"hidden_size": "wide"}, "hidden_size must be a number"),
        ({"num_attention_heads": 5}, "heads = 5 does not divide"),
    ],
)
def test_import_refuses_configurations(tmp_path, exported, capsys, change, message):
    network = "discriminator" if "num_attention_heads" in change else "generator"
    change_json(exported / network / "config.json", **change)
    assert message in refused(capsys, "import", exported, "--out", tmp_path / "new")


def test_import_refuses_weights_that_do_not_fit(tmp_path, exported, capsys):
    out, generator = tmp_path / "new", exported / "generator"
    table = "electra.embeddings.word_embeddings.weight"
    for change, message in (
        (lambda t: t.update({"generator_lm_head.weight": t[table] + 1}), "output table is not its"),
        (lambda t: t.update({"generator_lm_head.bias": torch.zeros(3)}), "has shape [3]"),
        (
            lambda t: t.pop("electra.encoder.layer.0.attention.self.key.bias"),
            "lack electra.encoder",
        ),
        (lambda t: t.pop("generator_predictions.dense.weight"), "are neither of"),
    ):
        change_tensors(generator, change)
        assert message in refused(capsys, "import", exported, "--out", out)
        change_tensors(generator, lambda t: t.pop("generator_lm_head.weight", None))
