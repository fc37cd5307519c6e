"""Generation against full forward passes, and the truncated distributions by brute force."""

import pytest
import torch

from qwenlib.generation import generate
from qwenlib.generation.sampler import sample_tokens
from qwenlib.model import Qwen, QwenConfig

V = 29
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2], [7, 18, 2, 8, 1, 8], [5, 5], [11, 12, 13]]


def model(seed=0) -> Qwen:
    shape = QwenConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        rope_theta=100.0, initializer_range=0.4,
    )  # fmt: skip
    net = Qwen(shape).initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return net


@torch.no_grad()
def greedy_by_full_passes(net, prompt, steps, stops=()):
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(net(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def test_greedy_equals_full_passes():
    net = model()
    want = [greedy_by_full_passes(net, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(w) for w in want}) == len(want), "rows differ, or the test shows little"
    for batch_size in (256, 2, 1):
        got = generate(net, PROMPTS, 12, batch_size=batch_size)
        assert got.completions == want and got.finished == [False] * 5


def test_finished_rows_leave_and_the_others_go_on():
    net = model()
    free = [greedy_by_full_passes(net, prompt, 12) for prompt in PROMPTS]
    stops = (free[0][2], free[2][5])  # some rows stop at different steps
    want = [greedy_by_full_passes(net, prompt, 12, stops) for prompt in PROMPTS]
    lengths = {len(w) for w in want}
    assert len(lengths) > 2 and 12 in lengths, "rows must stop at several times and one never"
    got = generate(net, PROMPTS, 12, eos_ids=stops)
    assert got.completions == want
    assert got.finished == [w[-1] in stops for w in want]


def test_finished_rows_that_wait_in_the_batch_stay_finished():
    """Rows leave an eighth of the batch at a time; until then their tokens are thrown away."""
    net = model()
    prompts = [[1 + i, 3 + i // 2] for i in range(20)]
    free = [greedy_by_full_passes(net, prompt, 12) for prompt in prompts]
    for stop in range(V):
        want = [greedy_by_full_passes(net, prompt, 12, (stop,)) for prompt in prompts]
        ends = [len(row) for row in want if row[-1] == stop]
        if any(ends.count(end) <= 2 and end < 12 for end in ends):
            assert generate(net, prompts, 12, eos_ids=(stop,)).completions == want
    assert any(len(set(row)) > 1 for row in free)


def test_samples_of_a_prompt_lie_together_and_share_its_prefill():
    net = model()
    greedy = generate(net, PROMPTS, 6).completions
    got = generate(net, PROMPTS, 6, samples=3, batch_size=6)
    assert got.completions == [row for row in greedy for _ in range(3)]
    drawn = generate(net, PROMPTS, 6, samples=3, temperature=1.0).completions
    assert len(drawn) == 15 and len({tuple(row) for row in drawn[:3]}) > 1


def test_seeds():
    net = model()
    one, same = (generate(net, PROMPTS, 8, temperature=1.0, seed=1) for _ in range(2))
    other = generate(net, PROMPTS, 8, temperature=1.0, seed=2)
    assert one == same and one != other


@torch.no_grad()
def test_sampled_frequencies_are_those_of_the_model():
    net = model().eval()
    draws = generate(net, [PROMPTS[0]], 1, temperature=1.3, samples=4000, batch_size=4000, seed=0)
    counts = torch.bincount(torch.tensor(draws.completions).flatten(), minlength=V) / 4000
    want = (net(torch.tensor([PROMPTS[0]]))[0, -1] / 1.3).softmax(-1)
    error = 5 * (want * (1 - want) / 4000).sqrt() + 1e-3
    assert ((counts - want).abs() < error).all()


def test_mode_and_edge_cases():
    net = model().train()
    assert generate(net, [], 3).completions == []
    generate(net, [[1]], 1)
    assert net.training, "the mode comes back"
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(net, [[1], []], 3)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(net, [[1]], 0)


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5], [0.0, 0.0, 3.0, -2.0, 1.0]])


def frequencies(temperature=1.0, top_p=1.0, top_k=0, draws=6000):
    generator = torch.Generator().manual_seed(0)
    rows = LOGITS.repeat_interleave(draws, 0)
    got = sample_tokens(rows, temperature, top_p, top_k, generator).view(2, draws)
    return torch.stack([torch.bincount(row, minlength=5) / draws for row in got])


def truncated(temperature, top_p, top_k):
    """The distribution by definition, token by token."""
    out = torch.zeros(2, 5)
    for row, logits in enumerate(LOGITS / temperature):
        order = sorted(range(5), key=lambda i: -logits[i].item())
        kept = order[: top_k or 5]
        mass, nucleus = 0.0, []
        probabilities = logits[kept].softmax(-1).tolist()
        for token, probability in zip(kept, probabilities):
            nucleus.append(token)
            mass += probability
            if mass >= top_p:
                break
        out[row, nucleus] = logits[nucleus].softmax(-1)
    return out


@pytest.mark.parametrize(
    "temperature,top_p,top_k",
    [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.0, 0.7, 0), (1.0, 1.0, 2), (2.0, 0.8, 4), (1.0, 1e-9, 0)],
)
def test_truncation_equals_its_definition(temperature, top_p, top_k):
    got, want = frequencies(temperature, top_p, top_k), truncated(temperature, top_p, top_k)
    assert (got[want == 0] == 0).all(), "a token that was cut off appears"
    assert (got[want > 0.005] > 0).all(), "a token that was kept never appears"
    assert ((got - want).abs() < 0.035).all()


@pytest.mark.parametrize("bad", [(-1.0, 1.0, 0), (1.0, 0.0, 0), (1.0, 1.1, 0), (1.0, 1.0, -1)])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match="top_p"):
        sample_tokens(LOGITS, *bad, torch.Generator())
