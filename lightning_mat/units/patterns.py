"""Names under which models keep their attention, FFN and expert parameters: data, not code.

Detection is structural. A module is an attention module if the paths of one
:class:`AttentionPattern` lead from it to linear layers and a head count is found beside them; it
is an FFN if the paths of one :class:`FFNPattern` lead to linear layers whose widths fit. Class
names never matter. A model that uses other names needs one line::

    register_attention(AttentionPattern(query="ask", key="match", value="read", out="write"))
    register_ffn(FFNPattern(("grow",), "shrink"))

What is registered last is tried first.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "nhead")
KEY_VALUE_HEAD_COUNTS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "kv_heads",
    "n_query_groups",
)
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_experts", "n_routed_experts")


@dataclass(frozen=True)
class AttentionPattern:
    """Where an attention module keeps its projections, as paths below the module.

    Give ``query``, ``key`` and ``value``; or ``query`` and ``key_value``; or ``packed``. A path
    leads to a linear layer, or to a matrix that is a parameter of the module itself, whose bias
    is then named by ``bias``.

    Args:
        out: Output projection; its inputs are the heads' outputs side by side.
        query: Query projection.
        key: Key projection.
        value: Value projection.
        key_value: Keys, then values, in one projection.
        packed: Queries, then keys, then values, in one projection.
        bias: Bias of packed matrices: the query's, then the key's, then the value's.
        interleaved: ``packed`` holds one head's (or key-value group's) query, key and value,
            then the next one's, instead of all queries first.
        marks: Attributes that the module must have, with a true value. They tell apart modules
            that use the same names for different layouts.

    Raises:
        ValueError: If the projections are not given in one of the three ways.
    """

    out: str
    query: str = ""
    key: str = ""
    value: str = ""
    key_value: str = ""
    packed: str = ""
    bias: str = ""
    interleaved: bool = False
    marks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = tuple(
            n for n in ("query", "key", "value", "key_value", "packed") if getattr(self, n)
        )
        ways = (("query", "key", "value"), ("query", "key_value"), ("packed",))
        if given not in ways or not self.out:
            raise ValueError(
                "an AttentionPattern needs out, and query, key and value, or query and key_value, "
                f"or packed, got {', '.join(given) or 'none of them'}"
                f"{'' if self.out else ' and no out'}"
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        """Paths of the projections that make queries, keys and values, in this order."""
        paths = (self.query, self.key, self.value, self.key_value, self.packed)
        return tuple(path for path in paths if path)


@dataclass(frozen=True)
class FFNPattern:
    """Where a feed-forward network keeps its linear layers, as paths below a module.

    Args:
        first: Layers whose outputs are the hidden neurons: one, or gate and up of a gated
            network. A layer with twice as many outputs as there are hidden neurons holds the
            gate in one half and the values in the other.
        second: The layer that reads the hidden neurons.
    """

    first: tuple[str, ...]
    second: str


def _separate(prefix: str, names: str) -> AttentionPattern:
    query, key, value, out = names.split()
    return AttentionPattern(query=prefix + query, key=prefix + key, value=prefix + value, out=out)


ATTENTION_PATTERNS: list[AttentionPattern] = [
    # Hugging Face: BERT and its family keep the projections one level below, and the output
    # projection beside them.
    _separate("self.", "query key value output.dense"),
    _separate("self.", "query_proj key_proj value_proj output.dense"),
    _separate("attention.", "query key value output.dense"),
    _separate("", "query key value dense"),
    _separate("", "query key value out"),
    _separate("", "query key value proj"),
    # Llama, Mistral, Mixtral, Qwen, ViT; BART, CLIP, OPT, Whisper; torchtune; Phi.
    _separate("", "q_proj k_proj v_proj o_proj"),
    _separate("", "q_proj k_proj v_proj out_proj"),
    _separate("", "q_proj k_proj v_proj output_proj"),
    _separate("", "q_proj k_proj v_proj dense"),
    # timm EVA-02; Wav2Vec2-BERT.
    _separate("", "q_proj k_proj v_proj proj"),
    _separate("", "linear_q linear_k linear_v linear_out"),
    # T5 and Switch Transformers; DistilBERT; Meta's Llama; diffusers; timm.
    _separate("", "q k v o"),
    _separate("", "q_lin k_lin v_lin out_lin"),
    _separate("", "wq wk wv wo"),
    _separate("", "to_q to_k to_v to_out.0"),
    _separate("", "to_q to_k to_v to_out"),
    _separate("", "q k v proj"),
    # torch.nn.MultiheadAttention: one packed matrix, or three where kdim or vdim differ.
    AttentionPattern(packed="in_proj_weight", bias="in_proj_bias", out="out_proj"),
    AttentionPattern(
        query="q_proj_weight",
        key="k_proj_weight",
        value="v_proj_weight",
        bias="in_proj_bias",
        out="out_proj",
    ),
    # GPTBigCode: [heads, 3, width], or all queries and one key and value (a single group).
    AttentionPattern(packed="c_attn", out="c_proj", interleaved=True, marks=("kv_heads", "kv_dim")),
    # GPT-2 and nanoGPT; GPT-2's cross-attention.
    AttentionPattern(query="q_attn", key_value="c_attn", out="c_proj"),
    AttentionPattern(packed="c_attn", out="c_proj"),
    # GPT-NeoX, BLOOM, Persimmon, Falcon.
    AttentionPattern(packed="query_key_value", out="dense", interleaved=True),
    # timm: MaxxViT, TinyViT and EfficientFormer; then ViT, Swin, BEiT and most others.
    AttentionPattern(packed="qkv", out="proj", interleaved=True, marks=("head_first",)),
    AttentionPattern(packed="qkv", out="proj", interleaved=True, marks=("key_dim", "val_dim")),
    AttentionPattern(packed="qkv", out="proj"),
    AttentionPattern(query="q", key_value="kv", out="proj"),
    # BLIP; Phi-3; MPT and DBRX; ModernBERT; lucidrains.
    AttentionPattern(packed="qkv", out="projection"),
    AttentionPattern(packed="qkv_proj", out="o_proj"),
    AttentionPattern(packed="Wqkv", out="out_proj"),
    AttentionPattern(packed="Wqkv", out="Wo"),
    AttentionPattern(packed="to_qkv", out="to_out.0"),
    AttentionPattern(packed="to_qkv", out="to_out"),
    AttentionPattern(query="to_q", key_value="to_kv", out="to_out.0"),
    AttentionPattern(query="to_q", key_value="to_kv", out="to_out"),
]

# Biases that some timm models keep beside a projection without one.
ATTENTION_BIASES = ("q_bias", "k_bias", "v_bias")

# Modules of these files use the weights of their projections without calling these, so that no
# call shows what a probe has to see: the one thing that the names of layers do not tell.
UNCALLED = {"torchvision.models.swin_transformer": "torchvision's Swin hands them to a function"}
# Some do so where they have biases beside: all of these, and timm's BEiT and EVA unless this
# attribute is true.
UNCALLED_WITH_BIASES = {
    "timm.models.swin_transformer_v2": (
        "timm's Swin V2 adds biases of its own to them, window by window"
    )
}
BIASES_APART = "qkv_bias_separate"

FFN_PATTERNS: list[FFNPattern] = [
    # Gated: Llama and its family; Meta's Llama; T5 v1.1; timm SwiGLU.
    FFNPattern(("gate_proj", "up_proj"), "down_proj"),
    FFNPattern(("w1", "w3"), "w2"),
    FFNPattern(("wi_0", "wi_1"), "wo"),
    FFNPattern(("fc1_g", "fc1_x"), "fc2"),
    # Gated, both halves in one layer: Phi-3; DINOv2; ModernBERT.
    FFNPattern(("gate_up_proj",), "down_proj"),
    FFNPattern(("w12",), "w3"),
    FFNPattern(("weights_in",), "weights_out"),
    FFNPattern(("Wi",), "Wo"),
    # Plain.
    FFNPattern(("intermediate.dense",), "output.dense"),
    FFNPattern(("fc1",), "fc2"),
    FFNPattern(("linear1",), "linear2"),
    FFNPattern(("c_fc",), "c_proj"),
    FFNPattern(("up_proj",), "down_proj"),
    FFNPattern(("wi",), "wo"),
    FFNPattern(("lin1",), "lin2"),
    FFNPattern(("ffn",), "ffn_output"),
    FFNPattern(("dense_h_to_4h",), "dense_4h_to_h"),
    FFNPattern(("intermediate_dense",), "output_dense"),
    FFNPattern(("linear_fc1",), "linear_fc2"),
    FFNPattern(("linear_1",), "linear_2"),
    FFNPattern(("fc_in",), "fc_out"),
    FFNPattern(("pwconv1",), "pwconv2"),
    FFNPattern(("w1",), "w2"),
    FFNPattern(("w_1",), "w_2"),
]

EXPERT_CONTAINERS: list[str] = ["experts", "local_experts", "deepspeed_experts"]


def register_attention(pattern: AttentionPattern) -> None:
    """Make :class:`~lightning_mat.units.heads.Heads` try a pattern before all others."""
    ATTENTION_PATTERNS.insert(0, pattern)


def register_ffn(pattern: FFNPattern) -> None:
    """Make :class:`~lightning_mat.units.ffn.FFN` try a pattern before all others."""
    FFN_PATTERNS.insert(0, pattern)


def register_experts(container: str) -> None:
    """Make :class:`~lightning_mat.units.experts.Experts` look into containers of this name."""
    EXPERT_CONTAINERS.insert(0, container)
