"""The parity check says yes for a right folder, and no for each thing that can differ."""

import json

import pytest
import torch

from qwenlib.evaluation import parity
from qwenlib.model import Qwen, QwenConfig, save_pretrained
from qwenlib.tokenizer import Tokenizer, train_bpe

PROMPTS = ["The answer to 12 + 30 is", "Grün ist der Baum. 你好!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.from_merges(train_bpe([*PROMPTS, "the tree is green"] * 3, 300))
    shape = QwenConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    save_pretrained(Qwen(shape).initialise(0), path, tokenizer)
    return path


def test_a_right_folder(folder):
    got = parity.compare_with_transformers(folder, PROMPTS, new_tokens=6)
    assert got.logits_difference < 1e-4
    assert got.same_greedy and got.same_ids and got.same_template


def test_other_weights_show(folder, monkeypatch):
    real = parity.load_pretrained

    def changed(*args, **options):
        model = real(*args, **options)
        with torch.no_grad():
            model.model.norm.weight.copy_(torch.linspace(-2, 2, 32))
        return model

    monkeypatch.setattr(parity, "load_pretrained", changed)
    got = parity.compare_with_transformers(folder, PROMPTS, new_tokens=6)
    assert got.logits_difference > 0.1 and not got.same_greedy
    assert got.same_ids and got.same_template


def test_a_nan_shows(folder, monkeypatch):
    real = parity.load_pretrained

    def changed(*args, **options):
        model = real(*args, **options)
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")
        return model

    monkeypatch.setattr(parity, "load_pretrained", changed)
    assert not parity.compare_with_transformers(folder, PROMPTS[:1], 1).logits_difference < 1


def test_the_folders_own_template_and_stops_count(folder, tmp_path, monkeypatch):
    """A layout with another system text, padded with the token that ends a turn."""
    plain = Tokenizer.from_pretrained(folder)
    template = plain.chat_template.replace("You are Qwen, created by Alibaba Cloud.", "Be kind.")
    keys = json.loads((folder / "tokenizer.json").read_text())
    other = Tokenizer(keys, template, pad_token="<|im_end|>")
    save_pretrained(parity.load_pretrained(folder), tmp_path, other)
    stops, real = [], parity.generate
    monkeypatch.setattr(
        parity, "generate", lambda *a, eos_ids: stops.append(eos_ids) or real(*a, eos_ids=eos_ids)
    )
    got = parity.compare_with_transformers(tmp_path, PROMPTS, new_tokens=6)
    assert got.same_template and got.same_greedy and got.same_ids
    assert stops == [(other.eos_token_id, other.end_of_text_id)] * 2


def test_other_ids_and_templates_show(folder, monkeypatch):
    monkeypatch.setattr(parity, "render", lambda *_, **__: "other")
    real = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: real(self, text + " "))
    got = parity.compare_with_transformers(folder, PROMPTS[:1], new_tokens=1)
    assert not got.same_ids and not got.same_template
