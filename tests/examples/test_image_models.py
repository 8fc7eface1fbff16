"""ViT, VGG16 and ResNet-18: sizes, and others' implementations where there are any."""

import doctest

import pytest
import torch

from examples.models import resnet, vgg, vit
from examples.models.resnet import ResNet18
from examples.models.vgg import VGG16
from examples.models.vit import ViT, ViTConfig
from lightning_mat import partition


def millions(model):
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize("module", [vit, vgg, resnet], ids=lambda m: m.__name__)
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


def test_sizes_are_the_published_ones():
    with torch.device("meta"):
        assert millions(VGG16()) == pytest.approx(14.72, abs=0.01)
        assert millions(ResNet18()) == pytest.approx(11.17, abs=0.01)
        # DeiT-small has 22.05 with 16 × 16 patches of 224 × 224 images and 1,000 classes.
        deit = ViTConfig(image=224, patch=16, classes=1000)
        assert millions(ViT(deit)) == pytest.approx(22.05, abs=0.01)
        assert ViTConfig().tokens == 65


@pytest.mark.parametrize(
    ("model", "units", "count"),
    [
        (lambda: ViT(ViTConfig(layers=2, hidden=128, image=8)), "heads+ffn", 2 * 2 + 2 * 8),
        (lambda: VGG16(width=2), "filters", 4224 // 32),
        (lambda: ResNet18(width=2), "filters", 4800 // 32),
    ],
)
def test_every_parameter_gets_a_gradient_and_units_are_found(model, units, count):
    torch.manual_seed(0)
    model = model()
    size = 8 if isinstance(model, ViT) else 32
    logits = model(torch.randn(4, 3, size, size))
    assert logits.shape == (4, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert len(partition(model, units)) == count


def test_resnet_equals_torchvisions_with_the_small_stem():
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = torch.nn.Identity()
    ours = ResNet18()
    names = {"residual.0": "conv1", "residual.1": "bn1", "residual.3": "conv2", "residual.4": "bn2"}
    names |= {f"shortcut.{i}": f"downsample.{i}" for i in (0, 1)}
    state, copied = theirs.state_dict(), {}
    for name in ours.state_dict():
        path, kind = name.rsplit(".", 1)
        if path.startswith("blocks."):
            _, block, inside = path.split(".", 2)
            path = f"layer{int(block) // 2 + 1}.{int(block) % 2}.{names[inside]}"
        path = {"stem.0": "conv1", "stem.1": "bn1", "classifier": "fc"}.get(path, path)
        copied[name] = state.pop(f"{path}.{kind}")
    assert state == {}
    ours.load_state_dict(copied)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        ours.eval()
        theirs.eval()
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_vgg_has_torchvisions_convolutions():
    torchvision = pytest.importorskip("torchvision")

    def widths(model):
        return [m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d)]

    with torch.device("meta"):
        assert widths(VGG16()) == widths(torchvision.models.vgg16_bn())


def test_vit_equals_timms():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 128, "depth": 2, "num_heads": 2}
    theirs = timm.models.vision_transformer.VisionTransformer(**sizes, num_classes=10)
    ours = ViT(ViTConfig(layers=2, hidden=128, image=8))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.2)
    state = ours.state_dict()
    copied = {
        "cls_token": state["class_token"].view(1, 1, -1),
        "pos_embed": state["positions"].unsqueeze(0),
    }
    for kind in ("weight", "bias"):
        for theirs_name, name in (("patch_embed.proj", "patches"), ("norm", "norm")):
            copied[f"{theirs_name}.{kind}"] = state[f"{name}.{kind}"]
        copied[f"head.{kind}"] = state[f"head.{kind}"]
        for i in range(2):
            inside = {
                "norm1": "attention_norm",
                "attn.proj": "attention.out",
                "norm2": "ffn_norm",
                "mlp.fc1": "ffn.fc1",
                "mlp.fc2": "ffn.fc2",
            }
            for there, here in inside.items():
                copied[f"blocks.{i}.{there}.{kind}"] = state[f"layers.{i}.{here}.{kind}"]
            copied[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(
                [state[f"layers.{i}.attention.{p}.{kind}"] for p in ("query", "key", "value")]
            )
    theirs.load_state_dict(copied)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.double().eval()(images)
        torch.testing.assert_close(ours.double().eval()(images), expected, rtol=1e-9, atol=1e-9)


def test_unusable_sizes_are_named():
    with pytest.raises(ValueError, match=r"multiple of 64.*got 100"):
        ViTConfig(hidden=100)
    with pytest.raises(ValueError, match=r"patch must divide.*32, got 5"):
        ViTConfig(patch=5)
