"""Per-sample gradients of embeddings, by the rows that occur: no one-hot matrix."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from lightning_mat.mntk.factors import Factor, Rows
from lightning_mat.mntk.rules.base import register_layer_rule


@register_layer_rule(nn.Embedding)
class EmbeddingRule:
    """y = W[index]: a token's output gradient is added to its row."""

    def item_dims(self, module: nn.Module) -> tuple[int, int]:
        """Indices in, vectors out."""
        return 0, 1

    def factors(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Factor]:
        """Return the factor of ``weight``.

        Raises:
            ValueError: If gradients are scaled by a row's frequency in the batch, which mixes
                the samples.
        """
        embedding = cast(nn.Embedding, module)
        if embedding.scale_grad_by_freq:
            raise ValueError(
                "scale_grad_by_freq=True divides a gradient by its row's frequency in the batch, "
                "so that it has no per-sample gradient: set it to False, or leave the embedding "
                "out of the units"
            )
        index = x.long()
        if embedding.padding_idx is not None:
            index = index.masked_fill(index == embedding.padding_idx, -1)
        return {"weight": Rows(index, grad, embedding.num_embeddings)}
