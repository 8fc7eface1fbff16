"""Tiny instances of the architectures people use, randomly initialised, float64, in eval mode.

``HEADS`` and ``FFNS`` list, per architecture, how to build and run it, how many units each layer
has, and the suffixes of the weights through which a unit speaks to the rest of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


@dataclass(frozen=True)
class Architecture:
    name: str
    build: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]
    layers: dict[str, int]
    outlet: str


def _ready(model: nn.Module) -> nn.Module:
    """Give every parameter a random value, norms and biases included, so that none is neutral."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def _logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


def _image(size: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, size, size, generator=generator, dtype=torch.float64)


def bert():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=12,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=12,
        max_position_embeddings=8,
    )
    return _ready(BertForMaskedLM(config)), _logits


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=12,
        n_embd=8,
        n_layer=2,
        n_head=4,
        n_positions=8,
        n_inner=12,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _ready(GPT2LMHeadModel(config)), _logits


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=12,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=12,
        attention_bias=True,
    )
    return _ready(LlamaForCausalLM(config)), _logits


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
    )
    return _ready(ViTForImageClassification(config)), lambda m: m(_image(8)).logits


def timm_vit():
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3, mlp_ratio=1, num_classes=5
    )
    return _ready(model), lambda m: m(_image(8))


def multihead():
    def run(model: nn.Module) -> Tensor:
        x = _image(8, 1)[:, 0]
        return model(x, x, x, need_weights=False)[0]

    return _ready(nn.MultiheadAttention(8, 4, batch_first=True)), run


def multihead_separate():
    def run(model: nn.Module) -> Tensor:
        x = _image(8, 1)[:, 0]
        return model(x, x[..., :6], x[..., :5], need_weights=False)[0]

    return _ready(nn.MultiheadAttention(8, 4, kdim=6, vdim=5, batch_first=True)), run


def torch_encoder():
    layer = nn.TransformerEncoderLayer(8, 4, 12, dropout=0.0, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return _ready(model), lambda m: m(_image(8, 1)[:, 0])


def torch_decoder():
    layer = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
    model = nn.TransformerDecoder(layer, 1)
    return _ready(model), lambda m: m(_image(8, 1)[:, 0], _image(8, 1)[:, 0, :5].flip(-1))


def compact_bert():
    from examples.models.bert import Bert, BertConfig

    model = Bert(BertConfig(1, 128, vocab_size=12, max_length=8))
    return _ready(model), lambda m: m(TOKENS)


def switch():
    from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

    config = SwitchTransformersConfig(
        vocab_size=12,
        d_model=8,
        d_kv=2,
        d_ff=12,
        num_heads=4,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_experts=3,
        relative_attention_num_buckets=4,
    )
    model = _ready(SwitchTransformersEncoderModel(config))
    return model, lambda m: m(input_ids=TOKENS).last_hidden_state


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=12,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=12,
        num_local_experts=3,
        bos_token_id=0,
        eos_token_id=0,
    )
    # The default, a grouped product, knows no float64.
    config._experts_implementation = "eager"
    return _ready(MixtralForCausalLM(config)), _logits


def _layers(prefix: str, units: int, layers: int = 2) -> dict[str, int]:
    return {f"{prefix}{i}": units for i in range(layers)}


HEADS = [
    Architecture("bert", bert, _layers("bert.encoder.layer.", 4), "attention.output.dense.weight"),
    Architecture("gpt2", gpt2, _layers("transformer.h.", 4), "attn.c_proj.weight"),
    Architecture("llama-gqa", llama, _layers("model.layers.", 2), "self_attn.o_proj.weight"),
    Architecture("vit", vit, _layers("vit.layers.", 4), "attention.o_proj.weight"),
    Architecture("timm-vit", timm_vit, _layers("blocks.", 3), "attn.proj.weight"),
    Architecture("multihead", multihead, {"": 4}, "out_proj.weight"),
    Architecture("multihead-kdim-vdim", multihead_separate, {"": 4}, "out_proj.weight"),
    Architecture("torch-encoder", torch_encoder, _layers("layers.", 4), "out_proj.weight"),
    Architecture(
        "torch-decoder",
        torch_decoder,
        {"layers.0.self_attn": 2, "layers.0.multihead_attn": 2},
        "out_proj.weight",
    ),
    Architecture(
        "switch",
        switch,
        {"encoder.block.0.layer.0": 4, "encoder.block.1.layer.0": 4},
        "SelfAttention.o.weight",
    ),
    Architecture("compact-bert", compact_bert, {"layers.0": 2}, "attention.out.weight"),
    Architecture("mixtral-gqa", mixtral, _layers("model.layers.", 2), "self_attn.o_proj.weight"),
]

FFNS = [
    Architecture("bert", bert, _layers("bert.encoder.layer.", 3), "output.dense.weight"),
    Architecture("gpt2", gpt2, _layers("transformer.h.", 3), "mlp.c_proj.weight"),
    Architecture("llama-gated", llama, _layers("model.layers.", 3), "mlp.down_proj.weight"),
    Architecture("vit", vit, _layers("vit.layers.", 3), "mlp.fc2.weight"),
    Architecture("timm-vit", timm_vit, _layers("blocks.", 3), "mlp.fc2.weight"),
    Architecture("torch-encoder", torch_encoder, _layers("layers.", 3), "linear2.weight"),
    Architecture("compact-bert", compact_bert, {"layers.0": 8}, "ffn.fc2.weight"),
    Architecture("switch", switch, {"encoder.block.0.layer.1": 3}, "mlp.wo.weight"),
]
