"""The 0.5B model at full size, randomly drawn: folders and greedy tokens between both libraries."""

import pytest
import torch

from qwenlib.evaluation.verify import redraw
from qwenlib.generation import generate
from qwenlib.model import Qwen, load_pretrained, presets, save_pretrained
from qwenlib.model.checkpoint import stored_tensors


def tensors_of(theirs) -> dict[str, torch.Tensor]:
    tensors = dict(theirs.state_dict())
    if theirs.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def assert_same_bits(ours: Qwen, theirs) -> None:
    mine, other = stored_tensors(ours), tensors_of(theirs)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.slow
@torch.no_grad()
def test_half_a_billion_parameters_there_and_back(tmp_path):
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config = presets.find("0.5b")
    theirs = Qwen2ForCausalLM(Qwen2Config(**config.to_hf()))
    redraw(theirs, seed=1)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 494_032_768
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs").eval()
    assert ours.config == config
    assert_same_bits(ours, theirs)

    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(0, config.vocab_size, (1, 16), generator=generator)
    tokens = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[0, 16:].tolist()  # fmt: skip
    assert generate(ours, prompt.tolist(), 64).completions[0] == tokens
    assert len(set(tokens)) > 3, "a model that says one thing shows little"

    del theirs
    save_pretrained(ours, tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert_same_bits(ours, back)
