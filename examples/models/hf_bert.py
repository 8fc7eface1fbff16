"""Hugging Face's BERT in the place of the project's own: the same arguments, logits and weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.models.bert import Bert, BertConfig

_OUTSIDE = {
    "words": "bert.embeddings.word_embeddings",
    "positions": "bert.embeddings.position_embeddings",
    "embedding_norm": "bert.embeddings.LayerNorm",
    "head.0": "cls.predictions.transform.dense",
    "head.2": "cls.predictions.transform.LayerNorm",
    "decoder": "cls.predictions.decoder",
}
_INSIDE = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn.fc1": "intermediate.dense",
    "ffn.fc2": "output.dense",
    "ffn_norm": "output.LayerNorm",
}


class HuggingFaceBert(nn.Module):
    """transformers' ``BertForMaskedLM``, called as :class:`examples.models.bert.Bert` is.

    The segment embedding is zero and stays so, as there is one segment per sample.

    Args:
        config: Size.

    Raises:
        ModuleNotFoundError: If transformers is not installed.
    """

    def __init__(self, config: BertConfig) -> None:
        """Make the model, initialised as transformers does."""
        super().__init__()
        try:
            import transformers
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Hugging Face's BERT needs the package `transformers`, which is not installed: "
                "pip install 'lightning-mat[hf]', or leave out hf=True"
            ) from error
        self.model = transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=4 * config.hidden,
                max_position_embeddings=config.max_length,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
                pad_token_id=None,  # no word is padding: every row of the embedding trains
            )
        )
        segments = self.model.bert.embeddings.token_type_embeddings.weight
        nn.init.zeros_(segments.requires_grad_(False))

    def forward(self, input_ids: Tensor, masked_positions: Tensor | None = None) -> Tensor:
        """Return logits, ``[S, M, V]`` at the masked positions, or ``[S, T, V]`` without any."""
        x = self.model.bert(input_ids).last_hidden_state
        if masked_positions is not None:
            x = x.take_along_dim(masked_positions.unsqueeze(-1), dim=1)
        return self.model.cls(x)

    @torch.no_grad()
    def copy_from(self, ours: Bert) -> None:
        """Take over the weights of the project's BERT of the same size."""
        names = dict(_OUTSIDE)
        for i in range(ours.config.layers):
            for here, there in _INSIDE.items():
                names[f"layers.{i}.{here}"] = f"bert.encoder.layer.{i}.{there}"
        state = self.model.state_dict()
        for name, value in ours.state_dict().items():
            path, kind = name.rsplit(".", 1)
            state[f"{names[path]}.{kind}"].copy_(value)
