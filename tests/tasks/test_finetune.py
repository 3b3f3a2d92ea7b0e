"""`fastelectra finetune` and `fastelectra glue` as a user runs them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import fastelectra
from test_reading import OFFICIAL
from transformers import AutoModelForSequenceClassification, AutoTokenizer, ElectraModel

from fastelectra.data import vocabulary
from fastelectra.outputs import claim
from fastelectra.tasks import pretrained
from fastelectra.tasks.finetune import table
from fastelectra.tasks.loop import predict
from fastelectra.tasks.packing import encode
from fastelectra.tasks.table import PAPER

TEXT = Path(__file__).parents[1] / "texts" / "washington.txt"


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    """Whatever this CPU is fast at: results are compared to the last digits."""
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)


@pytest.fixture(scope="session")
def similar(tmp_path_factory):
    """Pairs in the layout of STS-B: a sentence, and as much of it as the score says."""
    folder = tmp_path_factory.mktemp("glue") / "STS-B"
    folder.mkdir()
    sentences = re.findall(r"[^.;\s][^.;]{15,50}[.;]", TEXT.read_text().replace("\n", " "))
    rng = np.random.default_rng(0)
    rows = []
    for index, other in enumerate(sentences):
        words, score = sentences[index - 1].split(), rng.integers(0, 11) / 2
        cut = round(len(words) * score / 5)
        second = " ".join(words[:cut] + other.split()[cut:])
        rows.append(f"{index}\ta\tb\tc\td\te\tf\t{' '.join(words)}\t{second}\t{score:.3f}")
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
    for name, part in (("train", rows[:160]), ("dev", rows[160:200])):
        (folder / f"{name}.tsv").write_text("\n".join([f"{header}\tscore", *part]) + "\n")
    test = [row.rpartition("\t")[0] for row in rows[200:220]]
    (folder / "test.tsv").write_text("\n".join([header, *test]) + "\n")
    return folder


@pytest.fixture
def official(tmp_path):
    """All of GLUE, an example or two each."""
    for folder, files in OFFICIAL.items():
        (tmp_path / "glue" / folder).mkdir(parents=True)
        for name, lines in files.items():
            (tmp_path / "glue" / folder / name).write_text("\n".join(lines) + "\n")
    return tmp_path / "glue"


def results_of(out):
    return json.loads((out / "results.json").read_text())


def test_from_text_to_submission(checkpoint, similar, tmp_path, capsys):
    arguments = [
        "--model",
        checkpoint,
        "--task",
        "sts-b",
        "--data",
        similar,
        "--out",
        tmp_path / "o",
    ]
    assert fastelectra("finetune", *arguments, "--seeds", 2, "--epochs", 3, "--lr", 3e-3) == 0
    printed = capsys.readouterr().out
    assert "sts-b: 160 train, 40 dev, 20 test; 3 epochs of batches of 32, lr 0.003" in printed
    assert "layer decay 0.8 (google), fp32" in printed
    assert re.search(r"sts-b seed 1  step 30/30  loss 0\.\d{4}  lr .*tok/s  left 0:00:00", printed)
    results = results_of(tmp_path / "o")
    assert [run["seed"] for run in results["runs"]] == [0, 1]
    scores = [run["dev"]["spearman"] for run in results["runs"]]
    assert results["median"]["dev"]["spearman"] == pytest.approx(np.mean(scores))
    assert (results["min"]["dev"]["spearman"], results["max"]["dev"]["spearman"]) == (
        min(scores), max(scores))  # fmt: skip
    assert results["best_seed"] == np.argmax(scores)
    assert results["examples"] == {"train": 160, "dev": 40, "test": 20}
    lines = (tmp_path / "o" / "submission" / "STS-B.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == [str(n) for n in range(200, 220)]
    assert all(0 <= float(line.split("\t")[1]) <= 5 for line in lines[1:])
    assert not (tmp_path / "o" / "seed-0" / "model").exists()

    # the same command again runs nothing; more seeds run only the new ones, to the same results
    assert fastelectra("finetune", *arguments, "--seeds", 3, "--epochs", 3, "--lr", 3e-3) == 0
    printed = capsys.readouterr().out
    assert "sts-b seed 1  done before" in printed
    assert results_of(tmp_path / "o")["runs"][:2] == results["runs"]
    assert (tmp_path / "o" / "model" / "model.safetensors").is_file()
    assert fastelectra("finetune", *arguments, "--epochs", 2, "--lr", 3e-3) == 2
    message = capsys.readouterr().err
    assert "seed-0 was made with settings.epochs = 3, now it is 2: name another --out" in message


def test_transformers_loads_the_model_and_computes_the_same(checkpoint, similar, tmp_path):
    out = tmp_path / "o"
    arguments = ["--model", checkpoint, "--task", "sts-b", "--data", similar, "--out", out]
    assert fastelectra("finetune", *arguments, "--epochs", 1) == 0
    model, report = AutoModelForSequenceClassification.from_pretrained(
        out / "model", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    rows = [line.split("\t") for line in (similar / "test.tsv").read_text().splitlines()[1:]]
    predictions = (out / "seed-0" / "test.tsv").read_text().splitlines()[1:]
    whole = 0
    for row, prediction in zip(rows, predictions, strict=True):
        inputs = tokenizer(*row[-2:], return_tensors="pt")
        if inputs["input_ids"].shape[1] <= 48:  # the libraries cut differently
            whole += 1
            expected = pytest.approx(float(prediction.split("\t")[1]), abs=1e-4)
            assert model.eval()(**inputs).logits.item() == expected
    assert whole >= 3


def test_texts_are_cut_to_the_length_asked_for(checkpoint, similar, tmp_path, capsys):
    rows = [
        line.split("\t") for path in similar.iterdir() for line in path.open() if line[0] != "i"
    ]
    arguments = ["--model", checkpoint, "--task", "sts-b", "--data", similar, "--epochs", 1]
    for asked, length in ((["--max-length", 30], 30), ([], 48)):
        assert fastelectra("finetune", *arguments, *asked, "--out", tmp_path / str(length)) == 0
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / str(length) / "model")
        assert tokenizer.model_max_length == length
        cut = sum(len(tokenizer(*row[7:9]).input_ids) > length for row in rows)
        told = f"seed 0  {cut} of 220 examples are longer than {length} tokens and were cut\n"
        assert (told in capsys.readouterr().out) == (length == 30)


@pytest.fixture
def folders(checkpoint, exported, tmp_path):
    """The same weights as a checkpoint, run, export, and what transformers writes of them."""
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    (run / "step-00000007").symlink_to(checkpoint)
    for name, cls in (("encoder", ElectraModel), ("head", AutoModelForSequenceClassification)):
        cls.from_pretrained(exported / "discriminator").save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(exported / "discriminator").save_pretrained(tmp_path / name)
    return [checkpoint, tmp_path / "run", exported, exported / "discriminator",
            tmp_path / "encoder", tmp_path / "head"]  # fmt: skip


def test_equal_weights_give_equal_results(folders, similar, tmp_path):
    found = []
    names = ["sts-b", "STS-B", "stsb", "Sts-b", "STSB", "sts-b"]
    for number, (folder, name) in enumerate(zip(folders, names, strict=True)):
        out = tmp_path / f"o{number}"
        arguments = ["--task", name, "--data", similar.parent, "--out", out, "--epochs", 1]
        assert fastelectra("finetune", "--model", folder, *arguments) == 0
        results = results_of(out)
        found.append((results["runs"][0]["dev"], results["weights"], results["settings"],
                      (out / "seed-0" / "test.tsv").read_text()))  # fmt: skip
    assert all(results == found[0] for results in found)


def test_two_processes_share_the_seeds_and_change_nothing(checkpoint, similar, tmp_path):
    arguments = ["finetune", "--model", checkpoint, "--task", "sts-b", "--data", similar]
    arguments += ["--seeds", 3, "--epochs", 1]
    assert fastelectra(*arguments, "--out", tmp_path / "one") == 0
    program = (
        "import sys, torch; torch.cpu.get_capabilities = dict; torch.set_num_threads(1);"
        "from fastelectra import cli; cli.console()"
    )
    (tmp_path / "command.py").write_text(program)
    launcher = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node", 2, "--standalone"]
    done = subprocess.run(
        [*map(str, launcher), str(tmp_path / "command.py"),
         *map(str, arguments), "--out", str(tmp_path / "two")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sts-b: median of 3 seeds") == 1
    one, two = results_of(tmp_path / "one"), results_of(tmp_path / "two")
    for run in (*one["runs"], *two["runs"]):
        del run["seconds"]
    assert one == two
    files = ("model/model.safetensors", "submission/STS-B.tsv", "seed-2/dev.tsv")
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_all_of_glue(checkpoint, official, tmp_path, capsys):
    (official / "WNLI").rename(official / "elsewhere")
    out = tmp_path / "o"
    assert fastelectra("glue", "--model", checkpoint, "--data", official, "--out", out) == 0
    printed = capsys.readouterr().out
    assert f"not in {official}, left out: WNLI" in printed
    assert "QQP/train.tsv: left out 1 of 3 rows" in printed
    assert re.search(r"CoLA +SST-2 +MRPC +STS-B +QQP +MNLI +QNLI +RTE +mean", printed)
    assert re.search(r"published, small +56\.8 +88\.3 .* 80\.4", printed)
    assert "this model" in printed
    submitted = {path.name for path in out.glob("submission/*")}
    names = "CoLA SST-2 MRPC STS-B QQP MNLI-m MNLI-mm QNLI RTE AX"
    assert submitted == {f"{name}.tsv" for name in names.split()}
    entailment = (out / "submission" / "AX.tsv").read_text().splitlines()
    assert entailment[1] in {f"0\t{name}" for name in ("entailment", "neutral", "contradiction")}
    mnli = results_of(out / "mnli")["runs"][0]
    assert mnli["dev"].keys() == mnli["dev_mm"].keys() == {"accuracy"}
    assert (out / "submission" / "MNLI-mm.tsv").read_text().startswith(
        "index\tprediction\n7\t")  # fmt: skip

    # AX alone, by the model that `finetune --task mnli` has written
    arguments = ["--task", "ax", "--data", official, "--out", tmp_path / "ax"]
    assert fastelectra("finetune", "--model", out / "mnli", *arguments) == 0
    again = (tmp_path / "ax" / "submission" / "AX.tsv").read_text().splitlines()
    glue = ["glue", "--model", checkpoint, "--data", official, "--out", out]
    assert again == entailment
    for other in (checkpoint, out / "rte"):
        assert fastelectra("finetune", "--model", other, *arguments) == 2
        assert "--task ax is predicted with the model of mnli" in capsys.readouterr().err

    # what is missing or malformed is said before anything is trained
    shutil.rmtree(out / "mnli" / "model")
    assert fastelectra(*glue) == 2
    assert f"remove {out / 'mnli' / 'seed-0'} to train it again" in capsys.readouterr().err
    (out / "mnli" / "seed-0" / "result.json").unlink()
    assert fastelectra(*glue) == 2
    assert "seed-0 has no whole result.json: remove that folder" in capsys.readouterr().err
    shutil.rmtree(out / "mnli" / "seed-0")
    (official / "AX" / "AX.tsv").write_text("index\tpremis\thypothesis\n0\ta\tb\n")
    assert fastelectra(*glue) == 2
    assert "has no column sentence1 or premise" in capsys.readouterr().err
    assert not (out / "mnli" / "seed-0").exists()


def test_a_fine_tuned_model_is_read_as_it_was(checkpoint, official, tmp_path):
    out = tmp_path / "o"
    arguments = ["--task", "mnli", "--data", official, "--out", out, "--epochs", 1]
    assert fastelectra("finetune", "--model", checkpoint, *arguments) == 0
    start = pretrained.load(out)
    texts = [("A.", "B."), ("the people of the United States", "")]
    examples = encode(vocabulary.line_encoder(start.tokenizer), start.special, texts, 24)
    ours = predict(start.classifier(3, seed=5), examples, 24)
    model = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    for row, example in zip(ours, examples, strict=True):
        segments = [int(place >= example.first) for place in range(len(example.tokens))]
        logits = model(input_ids=torch.tensor(example.tokens)[None],
                       token_type_ids=torch.tensor([segments])).logits  # fmt: skip
        np.testing.assert_allclose(logits[0].detach().numpy(), row, rtol=1e-4, atol=1e-5)
    assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}


def test_a_new_task_has_a_new_head(checkpoint, official, tmp_path):
    def weights_of(model, task, seed):
        out = tmp_path / f"{model.name}-{task}-{seed}"
        arguments = ["--task", task, "--data", official, "--out", out, "--epochs", 1]
        assert fastelectra("finetune", "--model", model, *arguments, "--seeds", seed + 1) == 0
        return out

    start = weights_of(checkpoint, "mnli", 0)  # three outputs; one step at a rate of 0
    for task in ("rte", "sts-b", "mnli"):
        once, again = (weights_of(model, task, 1) for model in (checkpoint, start))
        for name in ("seed-1/dev.tsv", "model/model.safetensors"):
            assert (once / name).read_bytes() == (again / name).read_bytes()


def test_what_else_makes_another_run(checkpoint, official, tmp_path, capsys):
    other = tmp_path / "other"
    assert fastelectra("export", checkpoint, other) == 0
    arguments = ["--task", "rte", "--data", official, "--out", tmp_path / "o", "--epochs", 1]
    assert fastelectra("finetune", "--model", other, *arguments) == 0
    config = other / "discriminator" / "config.json"
    before, changed = config.read_text(), json.loads(config.read_text())
    changed["num_attention_heads"] = 1
    config.write_text(json.dumps(changed))
    assert fastelectra("finetune", "--model", other, *arguments) == 2
    assert "seed-0 was made with weights = " in capsys.readouterr().err
    config.write_text(before)
    tokenizer = other / "discriminator" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"lowercase":true', '"lowercase":false'))
    tokenizer.write_text(tokenizer.read_text().replace('"lowercase": true', '"lowercase": false'))
    assert fastelectra("finetune", "--model", other, *arguments) == 2
    assert "seed-0 was made with tokenizer = " in capsys.readouterr().err


def test_a_custom_task(checkpoint, tmp_path, capsys):
    rows = [f"the {word} came\t{label}" for word, label in (("war", "bad"), ("peace", "good"))] * 8
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("\n".join(["said\tmood", *rows]))
    out = tmp_path / "o"
    arguments = ["--data", tmp_path, "--out", out, "--lr", 0.01, "--epochs", 30]
    custom = ["--task", "custom", "--text", "said", "--label", "mood"]
    assert fastelectra("finetune", "--model", checkpoint, *custom, *arguments) == 0
    assert "custom: 2 classes: bad 8, good 8\n" in capsys.readouterr().out
    assert results_of(out)["median"]["dev"] == {"accuracy": 1.0, "matthews": 1.0}
    predicted = (out / "seed-0" / "dev.tsv").read_text().splitlines()
    assert predicted[:3] == ["index\tprediction\tlabel", "0\tbad\tbad", "1\tgood\tgood"]
    assert not (out / "submission").exists()


def test_a_custom_regression(checkpoint, tmp_path, capsys):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").write_text("said,mood\nwar,1.5\npeace,4.5\n")
    arguments = ["--text", "said", "--label", "mood", "--data", tmp_path, "--out", tmp_path / "o"]
    assert fastelectra("finetune", "--model", checkpoint, "--task", "custom", *arguments) == 0
    assert "custom: regression, 1.5 to 4.5\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "rte", "--model", "nowhere"], "nowhere: no such folder\n"),
        (["--task", "rte", "--model", "google/electra-x"],
         "no such folder; if it is a model on the Hugging Face Hub, download it first:"
         " hf download google/electra-x --local-dir electra-x\n"),
        (["--task", "rte", "--model", "."], "no checkpoint in ."),
        (["--task", "rte", "--data", "nowhere"], "--data nowhere: no such folder"),
        (["--task", "rte", "--data", "."], "has no train set of rte: expected train.tsv"),
        (["--task", "custom"], "--task custom needs --text COLUMN[,COLUMN] --label COLUMN"),
        (["--task", "custom", "--text", "a,,b", "--label", "c"], "expected one or two columns"),
        (["--task", "rte", "--text", "a"], "--text and --label are for --task custom"),
        (["--task", "custom", "--text", "a", "--label", "b", "--data", "hub"], "not custom"),
        (["--task", "rte", "--lr", "1e30"], "lower --lr"),
        (["--task", "rte", "--max-length", "3"], "--max-length 3: the model takes 4 to 48"),
        (["--task", "rte", "--max-length", "49"], "49: the model takes 4 to 48 tokens"),
        (["--task", "ax", "--epochs", "3"], "leave out --seeds, --lr and --epochs"),
    ],
)  # fmt: skip
def test_mistakes(arguments, message, checkpoint, official, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    given = {"--model": checkpoint, "--data": official, "--out": tmp_path / "o"}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert fastelectra("finetune", *(item for pair in given.items() for item in pair)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path.name for path in (tmp_path / "o").glob("*")} <= {"finetune.lock"}


def test_what_is_not_its_own_is_never_replaced(checkpoint, official, tmp_path, capsys):
    def refused(message, model, out):
        arguments = ["--task", "rte", "--data", official, "--out", out, "--epochs", 1]
        assert fastelectra("finetune", "--model", model, *arguments) == 2
        assert message in capsys.readouterr().err

    theirs, run = tmp_path / "theirs", tmp_path / "run"
    assert fastelectra("export", checkpoint, theirs / "model") == 0
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step-00000007").symlink_to(checkpoint)
    for model, out, name in ((theirs / "model", theirs, "model"), (run, run, "checkpoints")):
        before = sorted(out.rglob("*"))
        refused(f"--out {out} has {name}, which this command has not made", model, out)
        assert sorted(out.rglob("*")) == before
    out = tmp_path / "o"
    with claim(out / "finetune.lock", "--out", ()):
        refused(f"another run is at work in {out}: wait", checkpoint, out)
    for _ in range(2):
        assert fastelectra("finetune", "--model", checkpoint, "--task", "rte", "--data", official,
                           "--out", out, "--epochs", 1) == 0  # fmt: skip
        (out / "finetune.lock").unlink()  # a finished seed shows too whose it is
    shutil.rmtree(out / "seed-0")
    refused(f"--model {out / 'model'} is what --out {out} replaces", out, out)
    assert (out / "model" / "model.safetensors").is_file()


def test_bad_arguments_end_with_usage(checkpoint, tmp_path):
    for wrong in (["--seeds", "0"], ["--lr", "-1"], ["--task", "rt"], ["--layer-decay", "x"]):
        with pytest.raises(SystemExit) as end:
            fastelectra("finetune", "--model", checkpoint, "--task", "rte", "--data", tmp_path,
                        "--out", tmp_path / "o", *wrong)  # fmt: skip
        assert end.value.code == 2


def test_glue_without_any_folder(checkpoint, tmp_path, capsys):
    arguments = ["--data", tmp_path, "--out", tmp_path / "o"]
    assert fastelectra("glue", "--model", checkpoint, *arguments) == 2
    message = (
        r"has none of GLUE's folders: CoLA, SST-2.*; one task's own is for `fastelectra finetune`"
    )
    assert re.search(message, capsys.readouterr().err)
    with pytest.raises(SystemExit):
        fastelectra("glue", "--help")
    assert "folder of all tasks' folders" in " ".join(capsys.readouterr().out.split())


def test_the_table_beside_the_papers():
    lines = table(PAPER["small"], "small").splitlines()
    assert lines[1].split()[2:] == lines[2].split()[2:]
    assert lines[1].split()[-1] == "80.4"
    assert table({"rte": 70.0}, "base").splitlines()[2].split()[2:] == ["–"] * 7 + ["70.0", "–"]
