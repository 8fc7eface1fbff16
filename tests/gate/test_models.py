"""Real architectures with the units that partition() finds: transformers, mixtures, VGG, ResNet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_mat import flops
from lightning_mat.gate import Gate
from lightning_mat.units import Filters, partition
from tests.gate.cases import SavedBytes, check
from tests.units.architectures import (
    FFNS,
    HEADS,
    bert,
    llama,
    mixtral,
    switch,
    timm_vit,
    torch_encoder,
)

ARCHITECTURES = {a.name: a.build for a in (*HEADS, *FFNS)}
SKIPS = ["weights", "units"]
# Gradients that are zero but for rounding: the bias of a key.
FLOOR = 1e-3


def without_attention_dropout(model: nn.Module) -> nn.Module:
    """Return the model in training mode; masks inside of attention are drawn head by head."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def decisions(count: int) -> list[list[bool]]:
    generator = torch.Generator().manual_seed(count)
    half = torch.rand(count, generator=generator) < 0.5
    few = torch.rand(count, generator=generator) < 0.15
    return [half.tolist(), few.tolist(), [False] * count]


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_keep_the_promise(name, skip):
    pytest.importorskip("timm" if name.startswith("timm") else "transformers")
    model, run = ARCHITECTURES[name]()
    model = model.train() if skip == "weights" else without_attention_dropout(model)
    part = partition(model)
    for active in decisions(len(part)):
        gate = check(model, part, active, run, skip=skip, floor=FLOOR)
        assert gate.in_full == ()
        gate.remove()


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("build", [mixtral, switch])
def test_experts_rest(build, skip):
    pytest.importorskip("transformers")
    model, run = build()
    model = model.train() if skip == "weights" else without_attention_dropout(model)
    part = partition(model, "experts+heads")
    assert "expert" in part.kinds
    for active in decisions(len(part)):
        gate = check(model, part, active, run, skip=skip, floor=FLOOR)
        assert gate.in_full == ()
        gate.remove()


@pytest.mark.parametrize("build", [bert, llama, timm_vit, switch, torch_encoder])
def test_attention_of_a_quarter_of_the_heads_costs_a_quarter(build):
    pytest.importorskip("timm" if build is timm_vit else "transformers")
    model, run = build()
    part = partition(without_attention_dropout(model), "heads")

    def counted(share: int) -> int:
        heads = len(part) // len(set(part.layers))
        with Gate(model, part, skip="units") as gate:
            gate.apply([i % heads < heads // share for i in range(len(part))])
            out = run(model)
            with flops.count() as counter:
                out.sum().backward()
        backward = ("attention", "bmm")
        return sum(
            n for name, n in counter.by_operation.items() if any(b in name for b in backward)
        )

    heads = len(part) // len(set(part.layers))
    assert counted(heads) * heads == counted(1) > 0


def vgg() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    features = torchvision.models.vgg.make_layers([4, "M", 8, 6, "M"], batch_norm=False)
    return nn.Sequential(features, nn.Flatten(), nn.Linear(6 * 4 * 4, 3))


def vgg_bn() -> nn.Module:
    vgg = pytest.importorskip("torchvision").models.vgg
    model = vgg.VGG(vgg.make_layers([4, "M", 8, 6, "M"], batch_norm=True), 3, dropout=0.0)
    model.classifier[0] = nn.Linear(6 * 7 * 7, 4096)
    return model


def resnet() -> nn.Module:
    resnet = pytest.importorskip("torchvision").models.resnet
    torch.manual_seed(0)
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, 3)
    return model


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("build", [vgg, vgg_bn, resnet])
def test_filters_of_convolutional_networks_rest(build, skip, affine):
    model = build().double().train()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    part = partition(model, Filters(affine))
    for active in decisions(len(part)):
        gate = check(model, part, active, lambda m: m(x), skip=skip, floor=FLOOR)
        assert gate.in_full == ()
        gate.remove()


def test_layers_rest():
    model = vgg().double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    part = partition(model, "layers")
    for active in decisions(len(part)):
        check(model, part, active, lambda m: m(x)).remove()


def test_a_resting_prefix_is_neither_computed_nor_saved():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4)))
    part = partition(model, "layers")
    x = torch.randn(5, 8)
    product = 2 * 5 * 8 * 8
    with Gate(model, part) as gate:
        gate.apply([unit.name.startswith("3") for unit in part.units])
        with SavedBytes(model) as saved, flops.count() as counter:
            model(x).sum().backward()
    # Four forward products and one weight gradient; the last layer's input and its output.
    assert counter.total == 5 * product
    assert saved.total == 2 * 5 * 8 * 4


def test_counted_operations_of_a_bert_step_fall_with_the_weights_at_rest():
    model, run = bert()
    model.train()
    part = partition(model)
    tokens = 12

    def counted(active: list[bool]) -> int:
        with Gate(model, part) as gate:
            gate.apply(active)
            with flops.count() as counter:
                run(model).sum().backward()
        return counter.total

    matrices = {n: s for n, s in part.shapes.items() if len(s) == 2}
    owned = torch.zeros(len(part), dtype=torch.int64)
    for name in matrices:
        for index, rect in part.owners.get(name, ()):
            owned[index] += rect.numel
    full = counted([True] * len(part))
    for active in decisions(len(part)):
        resting = int(owned[~torch.tensor(active)].sum())
        assert full - counted(active) == 2 * tokens * resting


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_of_hugging_face_models(skip):
    model, run = bert()
    without_attention_dropout(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    part = partition(model)
    for active in decisions(len(part)):
        check(model, part, active, run, skip=skip, floor=FLOOR).remove()


def test_keyword_arguments_and_masks_go_through():
    model, _ = bert()

    def hidden(m: nn.Module) -> Tensor:
        return m.bert(
            input_ids=torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[1, 1, 0]])
        )[0]

    check(model, partition(model), decisions(len(partition(model)))[0], hidden)
