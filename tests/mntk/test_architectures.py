"""The probe is exact on the models people use, for the units people use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.models.bert import Bert, BertConfig
from lightning_mat import mntk, partition
from tests.reference.jacobian import jacobian_grams

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokens(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 20, (3, 5))}


def image(model: nn.Module) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 8, 8, dtype=torch.float64)}


def bert() -> nn.Module:
    config = transformers.BertConfig(
        **SMALL, vocab_size=20, intermediate_size=12, max_position_embeddings=8
    )
    return transformers.BertForMaskedLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **{**SMALL, "hidden_size": 16, "num_attention_heads": 4},
        vocab_size=20,
        intermediate_size=12,
        num_key_value_heads=2,
        max_position_embeddings=8,
    )
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        **SMALL, intermediate_size=12, image_size=8, patch_size=4, num_labels=3
    )
    return transformers.ViTForImageClassification(config)


def timm_vit() -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3
    )


def vgg() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    features = torchvision.models.vgg.make_layers([4, "M", 6, 6, "M"], batch_norm=True)
    model = torchvision.models.VGG(features, num_classes=3)
    model.classifier = nn.Linear(6 * 49, 3)
    return model


def resnet() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(
        block, [1, 1, 1, 1], num_classes=3, groups=2, width_per_group=1
    )


def own_bert() -> nn.Module:
    return Bert(BertConfig(layers=1, hidden=64, vocab_size=20, max_length=8))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], str]] = {
    "bert": (bert, tokens, "auto"),
    "bert layers": (bert, tokens, "layers"),
    "gpt2": (gpt2, tokens, "auto"),
    "gpt2 layers": (gpt2, tokens, "layers"),
    "llama": (llama, tokens, "auto"),
    "llama layers": (llama, tokens, "layers"),
    "vit": (vit, image, "auto"),
    "vit layers": (vit, image, "layers"),
    "timm vit layers": (timm_vit, lambda m: {"x": image(m)["pixel_values"]}, "layers"),
    "vgg": (vgg, lambda m: {"x": image(m)["pixel_values"]}, "auto"),
    "resnet": (resnet, lambda m: {"x": image(m)["pixel_values"]}, "filters"),
    "timm vit": (timm_vit, lambda m: {"x": image(m)["pixel_values"]}, "auto"),
    "own bert": (own_bert, tokens, "auto"),
}


@pytest.mark.parametrize("name", MODELS)
def test_probe_is_exact(name: str) -> None:
    torch.manual_seed(0)
    make, batch_of, units = MODELS[name]
    model = make().double().eval()
    batch = batch_of(model)
    part = partition(model, units)

    def scalars(module: nn.Module) -> Tensor:
        result = module(**batch)
        logits = result if isinstance(result, Tensor) else result.logits
        return logits.flatten(1).sum(1)

    expected = jacobian_grams(model, scalars, part)
    found = mntk(model, batch, part, keep_gram=True)
    assert found.gram is not None
    error = (found.gram - expected).flatten(1).norm(dim=1)
    size = expected.flatten(1).norm(dim=1)
    assert (error <= 1e-5 * size + 1e-9 * size.max()).all()
    assert (size > 0).sum() >= len(part) // 2
