"""What benchmarks/step.py trains: models with their units, batches and losses.

Beside each model stand its blocks, which a user may freeze whole, and its residual branches, which
may be left out of a backward pass: what :mod:`benchmarks.rivals` needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.probe import make_batch
from examples.models.bert import Bert, preset
from examples.models.resnet import ResNet18
from examples.models.switch import Switch, SwitchConfig
from examples.models.vgg import VGG16
from examples.models.vit import ViT, ViTConfig
from lightning_mat.units import Filters

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model as it is trained.

    Attributes:
        title: For people.
        units: What :func:`lightning_mat.partition` is asked for.
        make: ``make(dropout, **sizes)`` → the model.
        draw: ``draw(batch_size, device, **sizes)`` → a batch of random data.
        loss: ``loss(model, batch)`` → the loss.
        blocks: The model's blocks from input to output, each a list of modules.
        branches: Its residual branches, one list for each kind.
        batch_size: Samples of a step, per type of device.
        full: Sizes of model and data.
        quick: Tiny sizes, to see whether everything runs.
        dropout: Probability; None for a model that has none.
    """

    title: str
    units: str | Filters
    make: Callable[..., nn.Module]
    draw: Callable[..., Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    blocks: Callable[[Any], list[list[nn.Module]]]
    branches: Callable[[Any], list[list[nn.Module]]]
    batch_size: Mapping[str, int]
    full: Mapping[str, int] = field(default_factory=dict)
    quick: Mapping[str, int] = field(default_factory=dict)
    dropout: float | None = None

    @property
    def unit_names(self) -> str:
        """What the units are called."""
        return self.units if isinstance(self.units, str) else "filters with their BatchNorm"


def _with_norms(workload: Workload) -> Workload:
    """Return the same, but that filters own their entries of the BatchNorm behind them."""
    title = f"{workload.title}, filters own their BatchNorm"
    return replace(workload, title=title, units=Filters(affine=True))


def _mlm_loss(model: nn.Module, batch: Batch) -> Tensor:
    out = model(batch["input_ids"], batch["masked_positions"])
    if isinstance(out, Tensor):
        return F.cross_entropy(out.flatten(0, 1), batch["labels"].flatten())
    loss = F.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten())
    return loss + 0.01 * out.balance


def _image_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["images"]), batch["labels"])


def _draw_words(
    batch_size: int, device: str, *, length: int, vocabulary: int, **sizes: int
) -> Batch:
    return make_batch(batch_size, length, vocabulary, device)


def _draw_images(batch_size: int, device: str, *, image: int = 32, **sizes: int) -> Batch:
    images = torch.randn(batch_size, 3, image, image, device=device)
    return {"images": images, "labels": torch.randint(10, (batch_size,), device=device)}


def _bert(name: str) -> Callable[..., nn.Module]:
    def make(dropout: float, *, length: int, vocabulary: int, tiny: int = 0) -> nn.Module:
        size = "tiny" if tiny else name
        return Bert(preset(size, vocab_size=vocabulary, max_length=length, dropout=dropout))

    return make


def _switch(
    dropout: float, *, length: int, vocabulary: int, layers: int = 4, hidden: int = 512
) -> nn.Module:
    return Switch(SwitchConfig(layers, hidden, vocabulary, length, dropout))


def _mixtral(
    dropout: float | None,
    *,
    length: int,
    vocabulary: int,
    layers: int = 4,
    hidden: int = 512,
    experts: int = 8,
) -> nn.Module:
    """Return a decoder whose experts are batched tensors, multiplied by grouped products."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=experts,
        max_position_embeddings=length,
        use_cache=False,
    )
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return cast(nn.Module, model)


def _next_word_loss(model: nn.Module, batch: Batch) -> Tensor:
    return cast(Tensor, model(batch["input_ids"], labels=batch["input_ids"]).loss)


def _vit(dropout: float, **sizes: int) -> nn.Module:
    return ViT(ViTConfig(**sizes, dropout=dropout))


def _layers(model: Any) -> list[list[nn.Module]]:
    return [[layer] for layer in model.layers]


def _convolutions(model: VGG16) -> list[list[nn.Module]]:
    """Return each convolution with its BatchNorm."""
    modules = list(model.features)
    return [modules[i : i + 2] for i, m in enumerate(modules) if isinstance(m, nn.Conv2d)]


_MLM = {"draw": _draw_words, "loss": _mlm_loss, "blocks": _layers, "dropout": 0.1}
_IMAGES = {"draw": _draw_images, "loss": _image_loss}
_QUICK_WORDS = {"length": 12, "vocabulary": 50}

WORKLOADS: dict[str, Workload] = {
    "bert-small": Workload(
        title="BERT-small, T = 128",
        units="heads+ffn",
        make=_bert("small"),
        branches=lambda m: [[x.attention for x in m.layers], [x.ffn for x in m.layers]],
        batch_size={"cpu": 16, "cuda": 128},
        full={"length": 128, "vocabulary": 30_522},
        quick={**_QUICK_WORDS, "tiny": 1},
        **_MLM,
    ),
    "vit-small": Workload(
        title="ViT-small, 4 × 4 patches of 32 × 32",
        units="heads+ffn",
        make=_vit,
        blocks=_layers,
        branches=lambda m: [[x.attention for x in m.layers], [x.ffn for x in m.layers]],
        batch_size={"cpu": 32, "cuda": 256},
        full={"layers": 12, "hidden": 384, "image": 32},
        quick={"layers": 2, "hidden": 128, "image": 8},
        dropout=0.0,
        **_IMAGES,
    ),
    "vgg16": Workload(
        title="VGG16 with BatchNorm, 32 × 32",
        units="filters",
        make=lambda dropout, **sizes: VGG16(**sizes),
        blocks=_convolutions,
        branches=lambda m: [],
        batch_size={"cpu": 128, "cuda": 512},
        quick={"width": 4},
        **_IMAGES,
    ),
    "resnet18": Workload(
        title="ResNet-18, 32 × 32",
        units="filters",
        make=lambda dropout, **sizes: ResNet18(**sizes),
        blocks=lambda m: [[block] for block in m.blocks],
        branches=lambda m: [[block.residual for block in m.blocks]],
        batch_size={"cpu": 64, "cuda": 512},
        quick={"width": 4},
        **_IMAGES,
    ),
    "switch": Workload(
        title="Switch encoder, 4 layers of 4 experts, T = 128",
        units="heads+experts",
        make=_switch,
        branches=lambda m: [[x.attention for x in m.layers], [x.mixture for x in m.layers]],
        batch_size={"cpu": 16, "cuda": 128},
        full={"length": 128, "vocabulary": 30_522},
        quick={**_QUICK_WORDS, "layers": 2, "hidden": 64},
        **_MLM,
    ),
    "mixtral": Workload(
        title="Mixtral, 4 layers of 8 batched experts, T = 128",
        units="heads+experts",
        make=_mixtral,
        draw=_draw_words,
        loss=_next_word_loss,
        blocks=lambda m: [[layer] for layer in m.model.layers],
        branches=lambda m: [[x.self_attn for x in m.model.layers], [x.mlp for x in m.model.layers]],
        batch_size={"cpu": 16, "cuda": 128},
        full={"length": 128, "vocabulary": 8192},
        quick={**_QUICK_WORDS, "layers": 2, "hidden": 64, "experts": 4},
    ),
    "bert-base": Workload(
        title="BERT-base, T = 512",
        units="heads+ffn",
        make=_bert("base"),
        branches=lambda m: [[x.attention for x in m.layers], [x.ffn for x in m.layers]],
        batch_size={"cpu": 1, "cuda": 32},
        full={"length": 512, "vocabulary": 30_522},
        quick={**_QUICK_WORDS, "tiny": 1},
        **_MLM,
    ),
}

for _name in ("vgg16", "resnet18"):
    WORKLOADS[f"{_name}-norms"] = _with_norms(WORKLOADS[_name])

#: What ``--model all`` stands for: BERT-base asks for a GPU, Mixtral for transformers.
ALL = tuple(name for name in WORKLOADS if name not in ("bert-base", "mixtral"))
