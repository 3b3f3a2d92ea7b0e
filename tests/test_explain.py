"""`fastelectra explain` says what the two networks say, by transformers' account."""

import pytest
import torch
from checkpoints import fastelectra, write_checkpoint
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from fastelectra.errors import FastElectraError
from fastelectra.explain import explain, render
from fastelectra.hub import load_pretrained

SENTENCE = "the president sent a message to the congress"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("explain")
    write_checkpoint(folder / "checkpoint", corpus)
    assert fastelectra("export", folder / "checkpoint", folder / "exported") == 0
    return folder / "exported"


@torch.no_grad()
def test_probabilities_are_the_networks_own(exported):
    pretrained = load_pretrained(exported)
    tokens = explain(pretrained, SENTENCE, mask="1,3", top=4)
    encoded = pretrained.tokenizer.encode(SENTENCE)
    ids = encoded.ids
    assert [token.token for token in tokens] == encoded.tokens

    masked = torch.tensor([ids])
    masked[0, [1, 3]] = pretrained.special["mask"]
    logits = ElectraForMaskedLM.from_pretrained(exported / "generator")(masked).logits[0]
    for place in (1, 3):
        values, indices = logits[place].softmax(-1).topk(4)
        names, shares = zip(*tokens[place].choices, strict=True)
        assert list(names) == [pretrained.tokenizer.id_to_token(i) for i in indices.tolist()]
        torch.testing.assert_close(torch.tensor(shares), values, atol=1e-6, rtol=1e-4)

    seen = torch.tensor([[pretrained.tokenizer.token_to_id(token.shown) for token in tokens]])
    model = ElectraForPreTraining.from_pretrained(exported / "discriminator")
    expected = model(seen).logits[0].sigmoid()
    told = torch.tensor([token.probability for token in tokens])
    torch.testing.assert_close(told, expected, atol=1e-6, rtol=1e-4)
    for place, token in enumerate(tokens):
        assert (token.choices is not None) == (place in (1, 3))
        assert token.replaced == (int(seen[0, place]) != ids[place])


def test_masks_in_the_text_are_filled_in(exported, capsys):
    pretrained = load_pretrained(exported)
    asked = explain(pretrained, "the war of the states", mask="2,4")
    written = explain(pretrained, "the [MASK] of [MASK] states")
    both = explain(pretrained, "the [MASK] of the states", mask="4")
    for tokens in (written, both):
        for place in (2, 4):
            shares, expected = dict(tokens[place].choices), dict(asked[place].choices)
            assert shares == pytest.approx(expected, rel=1e-4)
        assert [token.shown for token in tokens] == [token.shown for token in asked]
    assert [token.replaced for token in written[1:5]] == [False, None, False, None]
    written[2].probability = 0.01
    assert "(wrong)" not in render(written[2:3], colours=False)  # who knows
    arguments = ["--model", exported / "discriminator", "the [MASK] of the states"]
    assert fastelectra("explain", *arguments) == 2
    assert "[MASK] needs a generator to fill it" in capsys.readouterr().err


def test_draws_depend_on_the_seed_alone(exported):
    pretrained = load_pretrained(exported)
    first, again, other = (explain(pretrained, SENTENCE, seed=seed) for seed in (1, 1, 2))
    drawn, same, others = ([t.sampled for t in tokens] for tokens in (first, again, other))
    assert drawn == same
    assert drawn != others
    masked = [place for place, token in enumerate(first) if token.choices]
    assert len(masked) >= 2
    assert 0 not in masked
    assert len(first) - 1 not in masked


def test_draws_follow_the_generator(exported):
    pretrained = load_pretrained(exported)
    drawn = {}
    for seed in range(300):
        token = explain(pretrained, "war", mask="1", top=1000, seed=seed)[1]
        drawn[token.sampled] = drawn.get(token.sampled, 0) + 1
    likely, share = token.choices[0]
    assert abs(drawn.get(likely, 0) - 300 * share) < 5 * (300 * share) ** 0.5 + 1
    assert len(drawn) > 20  # a sample, not the likeliest


def test_command_prints_what_happened(exported, capsys):
    assert fastelectra("explain", "--model", exported, "--mask", "1,3", SENTENCE) == 0
    printed = capsys.readouterr().out
    assert "generator saw      [CLS] [MASK] " in printed
    assert "P(replaced)" in printed
    assert "\x1b" not in printed  # not a terminal


def test_colours_mark_the_probability(exported):
    tokens = explain(load_pretrained(exported), SENTENCE, mask="1")
    tokens[1].probability, tokens[1].replaced = 0.99, True
    tokens[2].probability = 0.01
    painted = render(tokens, colours=True)
    assert f"\x1b[1;38;5;196m{tokens[1].shown}\x1b[0m" in painted
    assert f"\x1b[38;5;34m{tokens[2].shown}\x1b[0m" in painted


def test_a_discriminator_alone_judges_the_sentence_as_it_stands(exported, capsys):
    assert fastelectra("explain", "--model", exported / "discriminator", SENTENCE) == 0
    printed = capsys.readouterr().out
    assert "generator" not in printed
    assert "discriminator saw" in printed
    arguments = ["--model", exported / "discriminator", "--generator", exported / "generator"]
    assert fastelectra("explain", *arguments, "--mask", "1", SENTENCE) == 0
    assert "generator saw      [CLS] [MASK]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "mask", "said"),
    [
        ("", None, "no tokens"),
        ("war \udcff", None, "not UTF-8"),
        ("war " * 60, None, "the model takes 46"),
        ("war", "0", "numbered 1 to"),
        ("war", "2", "numbered 1 to"),
        ("war", "one", "expected numbers such as 1,3"),
        ("war", "", "expected numbers such as 1,3"),
    ],
)
def test_mistakes_are_named(exported, text, mask, said):
    with pytest.raises(FastElectraError, match=said):
        explain(load_pretrained(exported), text, mask)


def test_any_number_is_a_seed(exported):
    assert explain(load_pretrained(exported), SENTENCE, seed=-(10**30))


def test_mask_needs_a_generator(exported, capsys):
    arguments = ["--model", exported / "discriminator", "--mask", "1", SENTENCE]
    assert fastelectra("explain", *arguments) == 2
    assert "--generator" in capsys.readouterr().err


def test_no_model_is_one_line(tmp_path, capsys):
    assert fastelectra("explain", "--model", tmp_path / "none", "war") == 2
    assert capsys.readouterr().err.count("\n") == 1
