"""Generation against full forward passes, and the truncated distributions by brute force."""

import math

import pytest
import torch

from qwenlib.generation import generate, stream, stream_text
from qwenlib.generation.sampling import Sampling, candidates, choose, penalise
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


def test_sixteen_unequal_prompts_give_what_each_gives_alone():
    net, generator = model(), torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 30, (16,), generator=generator).tolist()
    prompts = [torch.randint(0, V, (n,), generator=generator).tolist() for n in lengths]
    assert len(set(lengths)) > 8
    together = generate(net, prompts, 24)
    alone = [generate(net, [prompt], 24).completions[0] for prompt in prompts]
    assert together.completions == alone
    assert alone[0] == greedy_by_full_passes(net, prompts[0], 24)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_equal_full_passes(temperature):
    """Before truncation and penalty, at the temperature; also of rows that stop early."""
    net = model().eval()
    got = generate(
        net, PROMPTS, 10, temperature=temperature, top_k=5, repetition_penalty=1.2, samples=2,
        eos_ids=(3, 8), logprobs=True, seed=5,
    )  # fmt: skip
    assert len({len(row) for row in got.completions}) > 1, "some rows stop, some do not"
    for row, (tokens, scores) in enumerate(zip(got.completions, got.logprobs, strict=True)):
        prompt = PROMPTS[row // 2]
        logits = net(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        want = (logits / (temperature or 1.0)).log_softmax(-1)[range(len(tokens)), tokens]
        torch.testing.assert_close(torch.tensor(scores), want, atol=1e-5, rtol=1e-5)
    assert generate(net, PROMPTS, 3).logprobs == []


def test_sampled_rows_do_not_depend_on_their_batch():
    net = model()
    options = {"temperature": 1.0, "samples": 2, "seed": 9, "eos_ids": (3,)}
    want = generate(net, PROMPTS, 12, **options).completions
    for batch_size in (1, 2, 4):
        assert generate(net, PROMPTS, 12, batch_size=batch_size, **options).completions == want


class Letters:
    """A tokenizer whose token i is one letter; 27 and 28 are the two bytes of an umlaut."""

    def token_bytes(self, token):
        return {27: b"\xc3", 28: b"\xbc"}.get(token, bytes([97 + token % 26]))

    def decode_bytes(self, tokens):
        return b"".join(map(self.token_bytes, tokens))

    def decode(self, tokens):
        return self.decode_bytes(tokens).decode("utf-8", "replace")


def test_stop_strings():
    net, letters = model(), Letters()
    free = generate(net, PROMPTS, 12).completions
    stop = letters.decode(free[0][4:6])  # two tokens of the first row: found across steps
    got = generate(net, PROMPTS, 12, stop_strings=(stop, "never"), tokenizer=letters)
    for row, tokens in enumerate(free):
        ends = [n for n in range(1, 13) if stop in letters.decode(tokens[:n])]
        assert got.completions[row] == tokens[: min(ends, default=12)]
        assert got.finished[row] == bool(ends)
    assert got.finished[0] and not all(got.finished)
    with pytest.raises(ValueError, match="need the tokenizer"):
        generate(net, PROMPTS, 12, stop_strings=("a",))
    with pytest.raises(ValueError, match="stop string is empty"):
        generate(net, PROMPTS, 12, stop_strings=("",), tokenizer=letters)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streaming_gives_the_same_tokens_one_by_one(temperature):
    net = model().train()
    options = {"temperature": temperature, "seed": 4, "eos_ids": (3,)}
    want = generate(net, [PROMPTS[0]], 12, **options).completions[0]
    tokens = stream(net, PROMPTS[0], 12, **options)
    assert next(tokens) == want[0]
    assert not net.training
    assert list(tokens) == want[1:]
    assert net.training
    broken = stream(net, PROMPTS[0], 12)
    next(broken)
    broken.close()  # a reader who goes away
    assert net.training


def test_streamed_text_holds_half_characters_back():
    parts = list(stream_text(Letters(), [0, 27, 28, 1, 26, 27], hidden=(26,)))
    assert parts == ["a", "ü", "b", "\N{REPLACEMENT CHARACTER}"]


def test_tokens_outside_the_embedding_are_named():
    for bad in (-1, V):
        with pytest.raises(ValueError, match=f"outside 0 to {V - 1}"):
            generate(model(), [[1, bad]], 3)
    with pytest.raises(ValueError, match="samples must be"):
        generate(model(), [[1]], 3, samples=0)


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


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5], [0.0, 0.2, 3.0, -2.0, 1.0]])


def frequencies(temperature=1.0, top_p=1.0, top_k=0, draws=6000):
    rows = LOGITS.repeat_interleave(draws, 0)
    uniform = torch.rand(len(rows), generator=torch.Generator().manual_seed(0))
    got = choose(rows, Sampling(temperature, top_p, top_k), uniform).view(2, draws)
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
        Sampling(*bad)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "penalty"),
    [(0.7, 0.8, 20, 1.05), (1.3, 0.3, 0, 1.0), (1.0, 1.0, 7, 1.5), (0.5, 1.0, 0, 0.8)],
)
def test_distribution_equals_transformers_processors(temperature, top_p, top_k, penalty):
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 50, generator=generator)
    ids = torch.randint(0, 50, (6, 9), generator=generator)
    processors = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    want = LogitsProcessorList(processors)(ids, logits.clone()).softmax(-1)
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter(1, ids, True)
    sampling = Sampling(temperature, top_p, top_k, penalty)
    p_NC, ids_NC = candidates(penalise(logits, seen, penalty), sampling)
    got = torch.zeros(6, 50).scatter_add(1, ids_NC, p_NC)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    assert ((want > 0).sum(-1) < 50).any() or (top_p == 1 and not top_k)


def test_penalty_reaches_prompt_and_new_tokens():
    """Greedy under a large penalty: no token twice, none of the prompt, as transformers does it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    net = model()
    theirs = Qwen2ForCausalLM(Qwen2Config(**net.config.to_hf())).eval()
    theirs.load_state_dict(net.state_dict())
    got = generate(net, PROMPTS, 12, repetition_penalty=1.3)
    assert got.completions != generate(net, PROMPTS, 12).completions
    for prompt, tokens in zip(PROMPTS, got.completions):
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
            repetition_penalty=1.3, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert tokens == out[0, len(prompt) :].tolist()


def test_a_uniform_of_almost_one_never_draws_what_was_cut_off():
    logits = torch.tensor([[0.0, 5.0, 4.0, -math.inf, -math.inf]])
    almost = torch.tensor([1 - 2**-24])
    for sampling in (Sampling(1.0), Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.9)):
        token = choose(logits, sampling, almost).item()
        assert logits[0, token] > -math.inf, sampling
        assert choose(logits, sampling, torch.zeros(1)).item() in (0, 1)
