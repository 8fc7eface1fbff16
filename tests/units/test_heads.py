"""Heads: each unit is one attention head, proved by gradients, on the models people use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mat.units import AttentionPattern, Heads, partition, register_attention
from lightning_mat.units.patterns import ATTENTION_PATTERNS
from tests.units.architectures import HEADS, Architecture
from tests.units.closure import assert_units_are_closed


@pytest.mark.parametrize("case", HEADS, ids=lambda case: case.name)
def test_each_unit_holds_exactly_the_parameters_of_its_head(case: Architecture):
    model, run = case.build()
    part = partition(model, "heads")
    assert {layer: part.layers.count(layer) for layer in part.layers} == case.layers
    assert set(part.kinds) == {"head"}
    for layer in case.layers:
        units = [unit for unit in part if unit.layer == layer]
        starts = [u.slices[-1].start for u in units]
        assert starts == sorted(starts), "head i is the i-th in the output projection's inputs"
        prefix = f"{layer}." if layer else ""
        assert [u.name for u in units] == [f"{prefix}head.{i}" for i in range(len(units))]
        assert_units_are_closed(model, run, units, case.outlet)


class Attention(nn.Module):
    """Softmax attention over whatever projections a test gives it."""

    def __init__(self, heads: int = 2, width: int = 8, **layers: nn.Module):
        super().__init__()
        self.num_heads = heads
        self.width = width
        for name, layer in layers.items():
            setattr(self, name, layer)

    def attend(self, q, k, v):
        """Attend, for q, k, v of shape [batch, tokens, heads, width]."""
        scores = torch.einsum("bthw,bshw->bhts", q, k).softmax(-1)
        return torch.einsum("bhts,bshw->bthw", scores, v).flatten(2)


class Interleaved(Attention):
    def forward(self, x):
        qkv = self.query_key_value(x).unflatten(-1, (self.num_heads, 3, -1))
        return self.dense(self.attend(*qkv.unbind(-2)))


class Packed(Attention):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, v = q + self.q_bias, v + self.v_bias
        return self.proj(self.attend(*(t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))))


class PackedGroups(Attention):
    num_kv_heads = 2

    def forward(self, x):
        q, k, v = self.qkv_proj(x).split([16, 8, 8], -1)
        k, v = (t.unflatten(-1, (2, 4)).repeat_interleave(2, -2) for t in (k, v))
        return self.o_proj(self.attend(q.unflatten(-1, (4, 4)), k, v))


class Cross(Attention):
    def forward(self, x):
        k, v = self.kv(x).chunk(2, -1)
        q = self.q(x)
        return self.proj(self.attend(*(t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))))


def _run(model):
    x = torch.linspace(-2, 2, 2 * 5 * 8, dtype=torch.float64).sin().view(2, 5, 8)
    return model(x)


def _with_biases(module):
    for name in ("q_bias", "v_bias"):
        module.register_parameter(name, nn.Parameter(torch.randn(8)))
    return module


@pytest.mark.parametrize(
    ("model", "outlet", "heads"),
    [
        (Interleaved(query_key_value=nn.Linear(8, 24), dense=nn.Linear(8, 8)), "dense.weight", 2),
        (
            _with_biases(Packed(qkv=nn.Linear(8, 24, bias=False), proj=nn.Linear(8, 8))),
            "proj.weight",
            2,
        ),
        (PackedGroups(4, qkv_proj=nn.Linear(8, 32), o_proj=nn.Linear(16, 8)), "o_proj.weight", 2),
        (Cross(4, q=nn.Linear(8, 8), kv=nn.Linear(8, 16), proj=nn.Linear(8, 8)), "proj.weight", 4),
    ],
    ids=["interleaved", "separate-biases", "packed-groups", "packed-key-value"],
)
def test_packed_layouts_are_taken_apart_head_by_head(model, outlet, heads):
    torch.manual_seed(0)
    model = model.double()
    part = partition(model, "heads")
    assert len(part) == heads
    assert part.remainder == (outlet.replace("weight", "bias"),)
    assert_units_are_closed(model, _run, list(part), outlet)


def test_a_module_compiled_on_its_own_is_seen_through():
    from tests.units.architectures import bert

    model, _ = bert()
    plain = partition(model, "heads")
    attention = model.bert.encoder.layer[0].attention
    attention.self = torch.compile(attention.self, backend="eager")
    part = partition(model, "heads")
    assert part.names == plain.names
    assert part.numel.tolist() == plain.numel.tolist()
    assert part.units[0].slices[0].param == (
        "bert.encoder.layer.0.attention.self._orig_mod.query.weight"
    )


def test_biases_that_one_head_cannot_own_stay_in_the_remainder():
    model = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    assert partition(model, "heads").remainder == ("bias_k", "bias_v", "out_proj.bias")


def test_single_key_value_head_makes_one_unit():
    model = Attention(
        4,
        q_proj=nn.Linear(8, 16),
        k_proj=nn.Linear(8, 4),
        v_proj=nn.Linear(8, 4),
        o_proj=nn.Linear(16, 8),
    )
    (unit,) = partition(model, "heads")
    assert unit.numel(partition(model, "heads").shapes) == 16 * 9 + 2 * 4 * 9 + 16 * 8


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ((9, 9, 9, 9), "2 heads, which do not divide the 9 outputs of .query.weight"),
        ((8, 6, 8, 8), "do not divide into key-value groups"),
        ((8, 8, 8, 6), "4 value outputs, but 'out.weight' reads 6 inputs"),
    ],
)
def test_sizes_that_contradict_the_head_count_are_refused(sizes, complaint):
    query, key, value, inner = sizes
    model = Attention(
        2,
        query=nn.Linear(8, query),
        key=nn.Linear(8, key),
        value=nn.Linear(8, value),
        out=nn.Linear(inner, 8),
    )
    with pytest.raises(ValueError, match=f"attention module '<root>'.*{complaint}.*choose other"):
        partition(model, "heads")


@pytest.mark.parametrize("outputs", [16, 22])
def test_packed_sizes_that_contradict_the_head_count_are_refused(outputs):
    model = nn.Sequential(Attention(2, qkv=nn.Linear(8, outputs), proj=nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=f"'0'.*the {outputs} outputs of '0.qkv.weight'"):
        partition(model, "heads")
    odd = Attention(3, qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8))
    with pytest.raises(ValueError, match="3 heads, which do not divide the 8 inputs"):
        partition(odd, "heads")


@pytest.fixture
def _patterns():
    """Forget the patterns that a test registers."""
    before = ATTENTION_PATTERNS.copy()
    yield
    ATTENTION_PATTERNS[:] = before


@pytest.mark.usefixtures("_patterns")
def test_unknown_projection_names_are_told_and_can_be_registered():
    model = Attention(
        2,
        ask=nn.Linear(8, 8),
        match=nn.Linear(8, 8),
        read=nn.Linear(8, 8),
        write=nn.Linear(8, 8),
    )
    with pytest.raises(ValueError, match=r"Attention: ask, match, read, write.*register_attention"):
        partition(model, "heads")
    register_attention(AttentionPattern(query="ask", key="match", value="read", out="write"))
    assert len(partition(model, Heads())) == 2


@pytest.mark.parametrize(
    "given",
    [
        {"out": "o"},
        {"out": "o", "query": "q"},
        {"out": "o", "packed": "qkv", "query": "q"},
        {"out": "", "packed": "qkv"},
    ],
)
def test_incomplete_patterns_are_refused(given):
    with pytest.raises(ValueError, match="an AttentionPattern needs out"):
        AttentionPattern(**given)


def test_projections_without_a_head_count_are_no_attention():
    model = Attention(2, query=nn.Linear(8, 8), key=nn.Linear(8, 8), value=nn.Linear(8, 8))
    model.out = nn.Linear(8, 8)
    del model.num_heads
    with pytest.raises(ValueError, match=r"found no heads in Attention.*unknown names.*\(layers\)"):
        partition(model, "heads")
