"""The compact BERT against the published sizes and against transformers' BERT."""

import doctest

import pytest
import torch
from torch import nn

from examples.models import bert
from examples.models.bert import Bert, BertConfig, preset
from examples.models.hf_bert import HuggingFaceBert


def parameters(config: BertConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Bert(config).parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny", 4.4),
        ("mini", 11.2),
        ("small", 28.8),
        ("medium", 41.7),
        ("base", 110.1),
        ("large", 335.1),
    ],
)
def test_presets_have_the_published_parameter_counts(name, millions):
    # The published counts hold a pooler (H² + H) and two segments (2 H), ours the head instead.
    assert parameters(preset(name)) == pytest.approx(millions * 1e6, rel=0.01)


def test_logits_at_masked_positions_are_the_full_logits_gathered():
    torch.manual_seed(0)
    model = Bert(preset("tiny", vocab_size=50, max_length=16, dropout=0.0)).double()
    words = torch.randint(50, (3, 12))
    positions = torch.stack([torch.randperm(12)[:4] for _ in range(3)])
    expected = model(words)[torch.arange(3).unsqueeze(1), positions]
    assert torch.allclose(model(words, positions), expected, rtol=1e-12, atol=1e-12)


def test_every_linear_and_embedding_sees_the_sample_dimension():
    model = Bert(preset("tiny", vocab_size=50, max_length=16))
    leading = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.register_forward_hook(
                lambda _, inputs, __, name=name: leading.update({name: inputs[0].shape[0]})
            )
    model(torch.zeros(5, 8, dtype=torch.long))
    assert set(leading.values()) == {5}
    assert {"positions", "layers.1.attention.out", "decoder"} <= set(leading)


def test_decoder_is_tied_unless_asked_otherwise():
    config = preset("tiny", vocab_size=50)
    tied, free = Bert(config), Bert(config, tied=False)
    assert tied.decoder.weight is tied.words.weight
    assert free.decoder.weight is not free.words.weight


def test_dropout_only_acts_in_training():
    torch.manual_seed(0)
    model = Bert(preset("tiny", vocab_size=50, max_length=16, dropout=0.5))
    words = torch.randint(50, (2, 8))
    assert not torch.equal(model(words), model(words))
    model.eval()
    assert torch.equal(model(words), model(words))


def test_unusable_sizes_are_named():
    with pytest.raises(ValueError, match=r"unknown preset 'huge'.*tiny, mini"):
        preset("huge")
    with pytest.raises(ValueError, match=r"multiple of 64.*got 100"):
        BertConfig(2, 100)
    with pytest.raises(ValueError, match="17 tokens is longer than max_length 16"):
        Bert(preset("tiny", vocab_size=9, max_length=16))(torch.zeros(1, 17, dtype=torch.long))


def test_doctests():
    assert doctest.testmod(bert).failed == 0


def test_logits_equal_those_of_transformers_bert():
    pytest.importorskip("transformers")
    config = preset("tiny", vocab_size=50, max_length=16)
    ours, theirs = Bert(config), HuggingFaceBert(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.2)
    theirs.copy_from(ours)
    ours.double().eval()
    theirs.double().eval()
    words = torch.randint(50, (3, 12))
    positions = torch.stack([torch.randperm(12)[:4] for _ in range(3)])
    with torch.no_grad():
        for arguments in ((words,), (words, positions)):
            torch.testing.assert_close(ours(*arguments), theirs(*arguments), rtol=1e-9, atol=1e-9)
    # Nothing but the segment embedding is missing.
    count = sum(p.numel() for p in theirs.parameters()) - 2 * 128
    assert sum(p.numel() for p in ours.parameters()) == count
