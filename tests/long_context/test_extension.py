"""Context extension: what changes in the model, and what must not."""

import pytest
import torch

from qwenlib.long_context.extension import extend_base, with_yarn
from qwenlib.model import Qwen, QwenConfig, save_pretrained


@pytest.fixture
def folder(tmp_path):
    shape = QwenConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        rope_theta=100.0, initializer_range=0.4,
    )  # fmt: skip
    save_pretrained(Qwen(shape).initialise(0), tmp_path)
    return tmp_path


IDS = torch.randint(0, 40, (1, 100), generator=torch.Generator().manual_seed(0))


def test_base_and_length_change_and_nothing_else(folder):
    model = extend_base(folder, 128, 1000.0)
    plain = Qwen(model.config.replace(rope_theta=100.0, max_position_embeddings=32)).initialise(0)
    assert model.config.rope_theta == 1000.0 and model.config.max_position_embeddings == 128
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))
    assert (model.rope_frequencies[1:] < plain.rope_frequencies[1:]).all()
    with torch.no_grad():
        assert not torch.allclose(model(IDS), plain(IDS), atol=1e-3)


@pytest.mark.parametrize("length,base", [(128, 50.0), (16, 1000.0)])
def test_shrinking_is_refused(folder, length, base):
    with pytest.raises(ValueError, match="shrinks"):
        extend_base(folder, length, base)


@torch.no_grad()
def test_yarn_equals_transformers(folder):
    from transformers import AutoModelForCausalLM, Qwen2Config

    model = with_yarn(folder, 4).eval()
    assert model.config.max_position_embeddings == 128
    assert model.config.yarn.original_max_position_embeddings == 32
    config = Qwen2Config(**model.config.to_hf())
    theirs = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    torch.testing.assert_close(model(IDS), theirs.eval()(IDS).logits, atol=1e-5, rtol=1e-5)
    again = with_yarn(folder, 4)
    save_pretrained(again, folder / "saved")
    with pytest.raises(ValueError, match="carries YaRN by 4 already"):
        with_yarn(folder / "saved", 4)
    opened = AutoModelForCausalLM.from_pretrained(folder / "saved", dtype=torch.float32)
    torch.testing.assert_close(model(IDS), opened.eval()(IDS).logits, atol=1e-5, rtol=1e-5)
