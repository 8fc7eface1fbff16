"""Gate rule for ``nn.MultiheadAttention``: which parameters its forward reads itself."""

from __future__ import annotations

from torch import nn

from lightning_mat.gate.rules import register_gate_rule

# Its forward hands the packed in_proj_weight and out_proj's weight to one functional call and
# never calls out_proj, so what rests whole of out_proj is detached here. Heads, which are rows of
# in_proj_weight and columns of out_proj's weight, get their gradients in full.
register_gate_rule(nn.MultiheadAttention, reads=("out_proj",))
