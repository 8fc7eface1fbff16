"""What can train, or rest, on its own: units, partitions, and the rules that find them.

- :func:`partition` cuts a model into units with rules; :class:`Partition` holds the result.
- A :class:`Unit` is a named set of :class:`Slice`, slabs of parameters.
- The rules are :class:`Experts`, :class:`Heads`, :class:`FFN`, :class:`Filters` and
  :class:`Layers`; :func:`register_rule` adds another (see :mod:`lightning_mat.units.rules`).
- The names by which rules recognise layers are data in :mod:`lightning_mat.units.patterns`;
  :func:`register_attention`, :func:`register_ffn` and :func:`register_experts` add to them.
"""

from lightning_mat.units.core import Partition
from lightning_mat.units.experts import Experts
from lightning_mat.units.ffn import FFN
from lightning_mat.units.filters import Filters
from lightning_mat.units.heads import Heads
from lightning_mat.units.layers import Layers
from lightning_mat.units.patterns import (
    AttentionPattern,
    FFNPattern,
    register_attention,
    register_experts,
    register_ffn,
)
from lightning_mat.units.regions import Block
from lightning_mat.units.rules import Rule, register_rule, rule_words
from lightning_mat.units.select import partition
from lightning_mat.units.unit import KINDS, Rect, Slice, Unit

__all__ = [
    "FFN",
    "KINDS",
    "AttentionPattern",
    "Block",
    "Experts",
    "FFNPattern",
    "Filters",
    "Heads",
    "Layers",
    "Partition",
    "Rect",
    "Rule",
    "Slice",
    "Unit",
    "partition",
    "register_attention",
    "register_experts",
    "register_ffn",
    "register_rule",
    "rule_words",
]
