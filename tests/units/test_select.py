"""partition(): what its ``units`` argument means, and what it says when something is wrong."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

from lightning_mat import MAT
from lightning_mat.units import (
    FFN,
    Heads,
    Layers,
    Partition,
    Slice,
    Unit,
    partition,
    register_rule,
    rule_words,
)
from lightning_mat.units import rules as registry
from tests.units.architectures import bert, mixtral, switch, timm_vit


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))


def halves(model: nn.Module):
    """The user's own cut of mlp()."""
    for i in range(2):
        yield Unit(f"half.{i}", "half", "0", (Slice("0.weight", 0, 4 * i, 4 * i + 4),))


class Embeddings:
    word = "embeddings"

    def find(self, model, taken):
        for path, module in model.named_modules():
            if isinstance(module, nn.Embedding) and f"{path}.weight" not in taken:
                yield Unit(path, "embedding", path, (Slice(f"{path}.weight"),))


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        (encoder(), {"head", "ffn"}),
        (nn.MultiheadAttention(8, 2), {"head"}),
        (mlp(), {"layer"}),
        (cnn(), {"filter"}),
    ],
    ids=["transformer", "attention", "mlp", "cnn"],
)
def test_auto_chooses_for_the_model_at_hand(model, kinds):
    assert set(partition(model).kinds) == kinds


@pytest.mark.parametrize(
    ("build", "kinds"),
    [
        (bert, {"head", "ffn"}),
        (timm_vit, {"head", "ffn"}),
        (switch, {"head", "expert"}),
        (mixtral, {"head", "expert"}),
    ],
)
def test_auto_chooses_for_the_models_people_use(build, kinds):
    assert set(partition(build()[0], "auto").kinds) == kinds


@pytest.mark.parametrize("units", ["heads+ffn", "ffn + heads", ["ffn", "heads"], [FFN(), Heads()]])
def test_words_and_rules_combine_in_any_order(units):
    assert partition(encoder(), units).units == partition(encoder()).units


@pytest.mark.parametrize("units", [FFN, FFN(), "ffn", ["ffn"], (FFN,)])
def test_a_word_stands_for_its_rule_with_default_options(units):
    assert partition(encoder(), units).names == ("ffn.0", "ffn.1", "ffn.2", "ffn.3")


def test_a_callable_is_a_rule():
    assert partition(mlp(), halves).names == ("half.0", "half.1")


def test_a_users_units_come_first_and_built_in_rules_take_what_is_left():
    part = partition(mlp(), [Layers(), halves])
    assert part.names == ("half.0", "half.1", "0", "2", "4")
    assert part.numel.tolist() == [16, 16, 8, 72, 18]


def test_a_registered_rule_is_asked_for_by_its_word(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", registry._RULES.copy())
    model = nn.Sequential(nn.Embedding(5, 8), encoder())
    register_rule("embeddings", Embeddings)
    assert rule_words()[0] == "embeddings"
    assert partition(model, "heads+embeddings").kinds == ("embedding", "head", "head")
    assert partition(model, ["heads", Embeddings()]).kinds == ("embedding", "head", "head")


@pytest.mark.parametrize("word", ["auto", "a+b", "", "two words"])
def test_words_that_could_not_be_told_apart_are_not_registered(word):
    with pytest.raises(ValueError, match="a rule's word must be an identifier"):
        register_rule(word, Embeddings)


def test_a_frozen_parameter_is_left_out_and_a_unit_with_nothing_left_vanishes():
    model = encoder()
    model.self_attn.in_proj_weight.requires_grad_(False)
    model.linear1.requires_grad_(False)
    model.linear2.requires_grad_(False)
    part = partition(model)
    assert part.kinds == ("head", "head")
    assert {s.param for s in part.units[0].slices} == {
        "self_attn.in_proj_bias",
        "self_attn.out_proj.weight",
    }
    assert "linear1.weight" in part.frozen
    assert "linear2.weight" not in part.remainder
    with pytest.raises(ValueError, match=r"no ffn in .* that could train: all 4 are frozen"):
        partition(model, "ffn")


def test_auto_turns_to_what_is_not_frozen():
    model = nn.ModuleDict({"backbone": encoder(), "head": nn.Linear(8, 2)})
    model["backbone"].requires_grad_(False)
    assert partition(model).names == ("head",)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="all parameters of ModuleDict are frozen"):
        partition(model)


def test_tied_weights_are_one_parameter():
    model = nn.Sequential(encoder(), encoder())
    model[1].linear1.weight = model[0].linear1.weight
    with pytest.raises(ValueError, match=r"units '0.ffn.0' and '1.ffn.0' both own elements"):
        partition(model, "ffn")
    for name in ("linear1.bias", "linear2.weight"):
        owner, _, leaf = name.partition(".")
        setattr(getattr(model[1], owner), leaf, model[0].get_parameter(name))
    part = partition(model, "ffn")
    assert part.names == ("0.ffn.0", "0.ffn.1", "0.ffn.2", "0.ffn.3")
    assert part.aliases["1.linear1.weight"] == "0.linear1.weight"


def test_a_shared_block_is_cut_once():
    block = encoder()
    assert partition(nn.Sequential(block, block)).layers == ("0",) * 6


class Lit(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.ModuleList([encoder()])


def test_lightning_modules_and_compiled_models_keep_their_parameter_names():
    model = Lit()
    plain = partition(model)
    assert plain.names[0] == "net.0.head.0"
    part = partition(torch.compile(model, backend="eager"))
    assert part.names == tuple(f"_orig_mod.{name}" for name in plain.names)
    assert part.numel.tolist() == plain.numel.tolist()


@pytest.mark.parametrize(
    ("units", "complaint"),
    [
        ("head", r"unknown units 'head': choose 'auto', one of experts, heads, ffn, filters, lay"),
        ("heads+", r"unknown units ''"),
        ("heads+auto", r"unknown units 'auto'"),
        (["auto"], r"'auto' chooses all units itself"),
        ([], r"units is an empty list"),
    ],
)
def test_unknown_words_are_refused_with_the_known_ones(units, complaint):
    with pytest.raises(ValueError, match=complaint):
        partition(encoder(), units)


@pytest.mark.parametrize(
    ("units", "complaint"),
    [
        (3, "units must be a word such as 'heads', a rule, a callable .* got int"),
        (None, "got NoneType"),
        ([Unit("a", "ffn", "", (Slice("0.weight"),))], r"lists a Unit \('a'\)"),
        (lambda model: 5, "units by <lambda>: expected an iterable of Unit, got int"),
        (lambda model: "heads", "expected an iterable of Unit, got str"),
        (lambda model: ["x"], "expected units, found 'x' of type str: return Unit"),
    ],
)
def test_what_is_no_rule_or_returns_no_units_is_refused(units, complaint):
    with pytest.raises(TypeError, match=complaint):
        partition(mlp(), units)


def test_a_model_without_matching_units_is_told_what_it_has():
    message = "partition found no heads in Sequential: choose from what it has .filters, layers.,"
    with pytest.raises(ValueError, match=message):
        partition(cnn(), "heads")
    with pytest.raises(ValueError, match=r"found no filters in Transf.*has .heads, ffn, layers."):
        partition(encoder(), "heads+filters")
    with pytest.raises(ValueError, match="partition found no units by <lambda> in Sequential"):
        partition(cnn(), lambda model: [])


def test_attention_of_an_unknown_layout_does_not_hide_what_else_there_is():
    model = nn.Module()
    model.num_heads, model.qkv, model.proj = 3, nn.Linear(8, 24), nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"no ffn in Module: choose from what it has .layers."):
        partition(model, "ffn")


def test_overlapping_units_of_a_user_are_named():
    def twice(model):
        return [Unit(n, "ffn", "", (Slice("0.weight"),)) for n in ("one", "two")]

    with pytest.raises(ValueError, match=r"units 'one' and 'two' both own elements of '0.weight'"):
        partition(mlp(), twice)


def test_units_that_name_no_parameter_are_named():
    with pytest.raises(ValueError, match="unit 'a' owns a slice of 'weight', which is not a param"):
        partition(mlp(), lambda model: [Unit("a", "ffn", "", (Slice("weight"),))])


def test_models_that_cannot_be_cut_are_refused():
    with pytest.raises(TypeError, match=r"partition needs a torch.nn.Module, got list"):
        partition([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        partition(nn.ReLU())
    with pytest.raises(ValueError, match=r"'0.weight' of Sequential has no shape yet"):
        partition(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match="has no shape yet"):
        partition(nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)))


def test_a_partition_is_returned():
    assert isinstance(partition(mlp()), Partition)


def test_describe_is_a_table_a_person_can_read():
    text = partition(nn.Sequential(encoder(), nn.Linear(8, 2))).describe()
    assert text == "\n".join(
        [
            "kind             layer  units  parameters  share of model",
            "---------------  -----  -----  ----------  --------------",
            "head             0          2         280           45.3%",
            "ffn              0          4         272           44.0%",
            "(always trains)                        66           10.7%",
            "total                       6         618          100.0%",
        ]
    )


def beit() -> nn.Module:
    timm = pytest.importorskip("timm.models.beit")
    return timm.Beit(img_size=32, embed_dim=32, depth=4, num_heads=4, qkv_bias=True, num_classes=3)


def eva() -> nn.Module:
    timm = pytest.importorskip("timm.models.eva")
    return timm.Eva(
        img_size=32,
        embed_dim=32,
        depth=2,
        num_heads=4,
        qkv_fused=False,
        swiglu_mlp=True,
        num_classes=3,
    )


def swin_v2() -> nn.Module:
    timm = pytest.importorskip("timm.models.swin_transformer_v2")
    return timm.SwinTransformerV2(
        img_size=32, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=3
    )


def torchvision_swin() -> nn.Module:
    models = pytest.importorskip("torchvision.models.swin_transformer")
    return models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=3)


def test_auto_knows_projections_of_their_own_names():
    assert set(partition(eva()).kinds) == {"head", "ffn"}


@pytest.mark.parametrize("build", [beit, swin_v2, torchvision_swin])
def test_auto_leaves_out_heads_that_cannot_be_measured_and_says_so(build):
    torch.manual_seed(0)
    model = build()
    with pytest.warns(UserWarning, match="without heads: .* without calling them"):
        part = partition(model)
    assert set(part.kinds) == {"ffn"}
    assert not any("cpb" in name for name in part.owners)
    engine = MAT(model, units=part)
    engine.update(torch.randn(4, 3, 32, 32), step=0)
    assert engine.spectra.finite.all()


def test_heads_can_be_measured_once_their_layers_are_called():
    torch.manual_seed(0)
    model = beit()
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
    part = partition(model)
    assert set(part.kinds) == {"head", "ffn"}
    MAT(model, units=part).update(torch.randn(4, 3, 32, 32), step=0)


def test_an_attention_whose_sizes_do_not_fit_is_left_out_by_auto():
    model = encoder()
    model.self_attn = nn.Module()
    model.self_attn.q_proj, model.self_attn.k_proj = nn.Linear(8, 10), nn.Linear(8, 8)
    model.self_attn.v_proj, model.self_attn.o_proj = nn.Linear(8, 8), nn.Linear(8, 8)
    model.self_attn.num_heads = 4
    with pytest.warns(UserWarning, match="without heads: .* 4 heads, which do not divide"):
        part = partition(model)
    assert set(part.kinds) == {"ffn"}
    with pytest.raises(ValueError, match="do not divide"):
        partition(model, "heads")


def test_attention_in_a_convolutional_network_leaves_it_one():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    model.attention = nn.Module()
    model.attention.fc1, model.attention.fc2 = nn.Linear(32, 4), nn.Linear(4, 32)
    model.attention.num_heads = 2
    assert set(partition(model).kinds) == {"filter"}


def test_a_parametrized_convolution_has_no_filters():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3))
    with pytest.raises(ValueError, match="no filters in .*: .* computed from other parameters"):
        partition(conv, "filters")
    both = nn.Sequential(conv, nn.Conv1d(4, 5, 3))
    assert partition(both, "filters").names == tuple(f"1.filter.{i}" for i in range(5))


def test_auto_says_so_where_attention_has_names_of_its_own():
    class Attention(nn.Module):
        num_heads = 4

        def __init__(self) -> None:
            super().__init__()
            self.ask, self.match, self.read, self.write = (nn.Linear(8, 8) for _ in range(4))

    with pytest.warns(UserWarning, match="without heads: .* look like attention"):
        part = partition(Attention())
    assert set(part.kinds) == {"layer"}
