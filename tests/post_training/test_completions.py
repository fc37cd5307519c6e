"""Log-probabilities of completions by either head: from all logits, and some rows at a time."""

import tomllib
from importlib import resources

import pytest
import torch

from qwenlib import kernels
from qwenlib.model import Qwen, QwenConfig
from qwenlib.post_training import completions
from qwenlib.post_training.completions import completion_batch, completion_logprobs
from qwenlib.post_training.preferences import PairBatch, pair_loss
from qwenlib.post_training.rollouts import RolloutBatch, rollout_loss
from qwenlib.post_training.sft import sequence_logprobs

V = 64


def model(tied=False) -> Qwen:
    config = QwenConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.3, tie_word_embeddings=tied,
    )  # fmt: skip
    return Qwen(config).initialise(0)


def rows():
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8]]
    return completion_batch(prompts, [[6, 7], [8, 9, 10, 11], [12] * 5, [13]], pad_id=0)


def of_all_logits(net, batch, temperature=1.0):
    return sequence_logprobs(net(batch.input_ids_NT), batch.labels_NT, temperature)


def in_parts(patch):
    """Take the head some rows at a time whatever the size; returns the sizes it was given."""
    seen = []

    def head(x_MD, *arguments):
        seen.append(len(x_MD))
        return kernels.logprobs.linear_logprobs(x_MD, *arguments)

    patch.setattr(completions, "_WHOLE_LOGITS", 0)
    patch.setattr(kernels, "linear_logprobs", head)
    return seen


HEADS = pytest.mark.parametrize("parts", [False, True])


@HEADS
@pytest.mark.parametrize("tied", [False, True])
def test_equal_to_those_of_all_logits(parts, tied):
    """Values and gradients, at a temperature; only the completions go through the head."""
    net = model(tied)
    with pytest.MonkeyPatch.context() as patch:
        seen = in_parts(patch) if parts else []
        got, mask = completion_logprobs(net, rows(), temperature=0.7)
    assert seen == ([12] if parts else [])
    expected, expected_mask = of_all_logits(net, rows(), 0.7)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(-1, 1, got.numel()).view_as(got)
    gradients = [
        torch.autograd.grad((logp * weights).sum(), list(net.parameters()))
        for logp in (got, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_dpo_and_grpo_by_either_head(autocast):
    net = model()
    pairs = PairBatch(rows(), torch.tensor([-9.0, -20.0, -25.0, -5.0]))
    stats = dict.fromkeys(
        ("reward", "zero_variance", "length", "finished", "tokens_left_out", "rows_left_out"), 0.0
    )
    episode = RolloutBatch(rows(), torch.tensor([1.0, -0.5, 0.25, -0.75]), stats)
    for loss_fn, batch in ((pair_loss(0.1), pairs), (rollout_loss(0.8), episode)):
        losses, gradients = [], []
        for parts in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                seen = in_parts(patch) if parts else []
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss, _, _ = loss_fn(net, batch)
            assert bool(seen) == parts
            losses.append(loss.item())
            gradients.append(torch.autograd.grad(loss, list(net.parameters())))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-5)
        for a, b in zip(*gradients, strict=True):
            limit = 2e-2 if autocast else 1e-5
            assert (a - b).norm() <= limit * a.norm()


def test_the_size_decides():
    net, batch = model(), rows()
    with pytest.MonkeyPatch.context() as patch:
        seen = in_parts(patch)
        patch.setattr(completions, "_WHOLE_LOGITS", 12 * V)
        completion_logprobs(net, batch)
        assert seen == []
        patch.setattr(completions, "_WHOLE_LOGITS", 12 * V - 1)
        completion_logprobs(net, batch)
    assert seen == [12]


def test_the_tiny_profile_holds_its_logits():
    """Its recorded numbers are those of whole logits; 64 pairs at once are its largest batch."""
    profiles = resources.files("qwenlib.profiles")
    tiny = {
        chapter: tomllib.loads((profiles / f"{chapter}.toml").read_text(encoding="utf-8"))["tiny"]
        for chapter in ("02_tokenizer", "10_dpo", "11_grpo")
    }
    most_rows = max(2 * 64, tiny["11_grpo"]["micro_batch_rows"], 2 * tiny["10_dpo"]["batch_pairs"])
    tokens = 1 + max(tiny[chapter]["max_new_tokens"] for chapter in ("10_dpo", "11_grpo"))
    assert most_rows * tokens * tiny["02_tokenizer"]["vocab_size"] <= completions._WHOLE_LOGITS
