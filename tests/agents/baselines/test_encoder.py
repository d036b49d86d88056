"""Texts are embedded by themselves, however they are batched; a BERT is an encoder as the small model is."""

import json

import numpy as np
import pytest

from agents.baselines import routellm
from agents.baselines.encoder import BATCH, encoder
from agents.baselines.examples import Examples
from agents.routers import artefact
from rollouts import tinymath
from rollouts.errors import ArtefactError, ConfigError
from rollouts.trees.stats import auc

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789=+*-%.,?"]
POSITIONS = 48


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT with random weights, and a WordPiece tokenizer of single characters, as transformers reads them."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join([*WORDS, *(f"##{word}" for word in WORDS[5:])]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=2 * len(WORDS) - 5, max_position_embeddings=POSITIONS, **shape)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["tinymath", "bert"])
def folder(request):
    return tinymath.model_dir("small") if request.param == "tinymath" else request.getfixturevalue("bert")


def test_means_of_hidden_states(folder):
    embed = encoder(folder)
    texts = ["Let a=3+4. Find a.", "Let b=9%5, c=b*2, d=c+8. Find d.", "x"]
    found = embed(texts)
    assert found.shape[0] == 3 and found.dtype == np.float64 and np.isfinite(found).all()
    for text, row in zip(texts, found, strict=True):  # padding is not among the tokens
        np.testing.assert_allclose(embed([text])[0], row, atol=1e-4)
    many = embed(texts * BATCH)
    np.testing.assert_allclose(many[:3], found, atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.fixture(scope="module")
def roberta(bert, tmp_path_factory):
    """Of the same tokenizer; its positions begin behind that of padding."""
    import torch
    from transformers import RobertaConfig, RobertaModel

    folder = tmp_path_factory.mktemp("roberta")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (folder / name).write_text((bert / name).read_text())
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=99, max_position_embeddings=POSITIONS, pad_token_id=0, **shape)
    RobertaModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_questions_beyond_the_window_are_cut_there(model, request):
    embed = encoder(request.getfixturevalue(model))
    whole = "a=1 " * POSITIONS
    np.testing.assert_allclose(embed([whole]), embed([whole + "b=2 " * 100]), atol=1e-5)


def test_a_head_on_a_bert_finds_a_sign_and_is_not_stored(bert, tmp_path):
    embed = encoder(bert)
    draw = np.random.default_rng(0)

    def questions(count):
        signs = draw.integers(0, 3, count)
        return [f"a={draw.integers(99)}{'+*%'[sign]}{draw.integers(9)}. find a." for sign in signs], signs == 2

    (texts, has), (new, there) = questions(300), questions(200)
    correct = np.stack([~has, np.ones(300)], axis=1).astype(float)
    examples = Examples(tuple(texts), correct)
    for method in (routellm.classifier, routellm.neighbours):
        router = method(examples, embed)
        assert auc(router.preference(new), there) > 0.95
        with pytest.raises(ArtefactError, match=f"{router.name} reads questions with a model of its own"):
            artefact.save(router, tmp_path / router.name, {})


def test_missing_models_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no encoder"):
        encoder(tmp_path / "nothing")
