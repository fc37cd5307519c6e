"""Batched generation: prompts prefilled once, then decoded together, a token a row and step.

Shapes: B prompts, N = B * samples rows, T time, S cache, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenlib.generation.decoder import begin
from qwenlib.generation.sampling import Sampling, choose, penalise
from qwenlib.model.transformer import Qwen
from qwenlib.tokenizer.stream import StreamDecoder

# Steps between two looks at which rows have stopped. Looking makes the host wait for a GPU.
_LOOK_CPU, _LOOK_GPU = 1, 16


@dataclass(frozen=True)
class Generation:
    """completions[i]: new token ids of row i, stop token included; rows of a prompt lie together.

    finished[i]: whether row i ended with a stop token or string rather than at the length limit.
    logprobs[i]: log p of each of its tokens under softmax(logits / temperature) (temperature 1 when
    greedy), before top_k, top_p and the penalty; empty unless asked for.
    """

    completions: list[list[int]]
    finished: list[bool]
    logprobs: list[list[float]] = field(default_factory=list)


def generate(
    model: Qwen, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 0.0,
    top_p: float = 1.0, top_k: int = 0, repetition_penalty: float = 1.0, samples: int = 1,
    seed: int = 0, eos_ids: Sequence[int] = (), stop_strings: Sequence[str] = (), tokenizer=None,
    logprobs: bool = False, batch_size: int = 256,
) -> Generation:  # fmt: skip
    """Continue each prompt `samples` times; temperature 0 is greedy (see `Sampling`).

    Prompts are padded on the left and prefilled once for all their samples. A row stops behind a
    token of eos_ids, behind the token that completes one of stop_strings (which need the
    tokenizer), or at max_new_tokens; rows that have stopped leave the batch, some at a time. The
    random numbers of a row depend on (seed, prompt's place, sample) alone, so batch_size changes
    nothing but rounding. Raises ValueError for an empty prompt, a token outside the vocabulary or
    a setting without meaning.
    """
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty)
    _check(model, prompts, max_new_tokens, samples, stop_strings, tokenizer)
    count = len(prompts) * samples
    out = Generation([[] for _ in range(count)], [False] * count)
    out.logprobs.extend([] for _ in range(count if logprobs else 0))
    if not prompts:
        return out
    uniform_NT = _uniforms(count, max_new_tokens, sampling, seed)
    # Prompts of like length together waste the least padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_batch = max(1, batch_size // samples)
    with _evaluating(model):
        for start in range(0, len(order), per_batch):
            chosen = order[start : start + per_batch]
            numbers = [prompt * samples + s for prompt in chosen for s in range(samples)]
            batch = _Batch(
                model, [prompts[i] for i in chosen], samples, max_new_tokens, sampling,
                uniform_NT[numbers], eos_ids, stop_strings, tokenizer, logprobs,
            )  # fmt: skip
            for place, tokens, scores, done in batch.run():
                row = numbers[place]
                out.completions[row] += tokens
                out.finished[row] |= done
                if logprobs:
                    out.logprobs[row] += scores
    return out


def stream(
    model: Qwen, prompt: list[int], max_new_tokens: int, *, temperature: float = 0.0,
    top_p: float = 1.0, top_k: int = 0, repetition_penalty: float = 1.0, seed: int = 0,
    eos_ids: Sequence[int] = (), stop_strings: Sequence[str] = (), tokenizer=None,
) -> Iterator[int]:  # fmt: skip
    """The tokens of `generate` for one prompt, each as soon as it is known."""
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty)
    _check(model, [prompt], max_new_tokens, 1, stop_strings, tokenizer)
    batch = _Batch(
        model, [prompt], 1, max_new_tokens, sampling,
        _uniforms(1, max_new_tokens, sampling, seed), eos_ids, stop_strings, tokenizer, False,
    )  # fmt: skip
    with _evaluating(model):
        for _, tokens, _, _ in batch.run():
            yield from tokens


def stream_text(tokenizer, tokens: Iterable[int], hidden: Iterable[int] = ()) -> Iterator[str]:
    """Text as its tokens arrive; bytes of a character wait for the last of them.

    Tokens in `hidden` (stop tokens) are left out. What is no UTF-8 becomes U+FFFD.
    """
    stream, hidden = StreamDecoder(tokenizer), set(hidden)
    for token in tokens:
        if token not in hidden and (text := stream.push(token)):
            yield text
    if text := stream.finish():
        yield text


def _uniforms(rows: int, steps: int, sampling: Sampling, seed: int) -> Tensor:
    """A random number for each row and step (N, T); one column that nobody reads when greedy."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((rows, steps if sampling.temperature > 0 else 1), generator=generator)


@contextmanager
def _evaluating(model: Qwen) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check(model, prompts, max_new_tokens, samples, stop_strings, tokenizer) -> None:
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty; start it with a control token such as <|endoftext|>")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer that turns tokens into text")
    if not all(stop_strings):
        raise ValueError("a stop string is empty: every text would end at once")
    rows = model.config.vocab_size
    for prompt in prompts:
        if min(prompt) < 0 or max(prompt) >= rows:
            raise ValueError(f"a prompt has a token outside 0 to {rows - 1}, the embedding's rows")


class _Batch:
    """Rows that are decoded together. Whatever changes in a step lives on the model's device."""

    def __init__(
        self, model, prompts, samples, max_new_tokens, sampling, uniform_NT, eos_ids, stop_strings,
        tokenizer, logprobs,
    ):  # fmt: skip
        self.model, self.sampling, self.max_new_tokens = model, sampling, max_new_tokens
        self.prompts, self.samples = prompts, samples
        self.stop_strings, self.tokenizer, self.logprobs = stop_strings, tokenizer, logprobs
        self.device = model.model.embed_tokens.weight.device
        self.eos_ids = torch.tensor(list(eos_ids), dtype=torch.long, device=self.device)
        self.uniform_NT = uniform_NT.to(self.device)
        self.graphs = self.device.type == "cuda"
        self.look = _LOOK_GPU if self.graphs else _LOOK_CPU

    @torch.no_grad()
    def run(self) -> Iterator[tuple[int, list[int], list[float], bool]]:
        """Yield (row, new tokens, their log-probabilities, stopped), in chunks of `look` steps."""
        logits_NV = self._prefill()
        N = len(logits_NV)
        places = list(range(N))  # the row in each place of the batch
        done_N = torch.zeros(N, dtype=torch.bool, device=self.device)
        text: dict[int, list[int]] = {row: [] for row in places}
        tokens_LN, scores_LN, done_LN = [], [], []
        for step in range(self.max_new_tokens):
            tokens_N, scores_N = self._choose(logits_NV, step)
            done_LN.append(done_N)
            done_N = done_N | torch.isin(tokens_N, self.eos_ids)
            tokens_LN.append(tokens_N)
            scores_LN.append(scores_N)
            last = step + 1 == self.max_new_tokens
            if last or len(tokens_LN) == self.look:
                stopped = done_N.tolist()
                skipped = torch.stack(done_LN).tolist()
                tokens = torch.stack(tokens_LN).tolist()
                scores = torch.stack(scores_LN).tolist() if self.logprobs else []
                tokens_LN, scores_LN, done_LN = [], [], []
                for place, row in enumerate(places):
                    steps = [i for i in range(len(tokens)) if not skipped[i][place]]
                    new = [tokens[i][place] for i in steps]
                    if not new:
                        continue
                    if self.stop_strings and (cut := self._stop_string(text[row], new)):
                        new, stopped[place] = new[:cut], True
                    text[row] += new
                    kept_scores = [scores[i][place] for i in steps[: len(new)]] if scores else []
                    yield row, new, kept_scores, stopped[place]
                if last or all(stopped):
                    return
                places, tokens_N, done_N = self._leave(places, stopped, tokens_N)
            logits_NV = self.decoder.step(tokens_N)

    def _prefill(self) -> Tensor:
        """Run the prompts, make their samples' rows; logits (N, V) of each row's first token."""
        width = max(len(prompt) for prompt in self.prompts)
        input_BT = torch.zeros(len(self.prompts), width, dtype=torch.long)
        real_BT = torch.zeros(len(self.prompts), width, dtype=torch.long)
        for i, prompt in enumerate(self.prompts):
            input_BT[i, width - len(prompt) :] = torch.tensor(prompt)
            real_BT[i, width - len(prompt) :] = 1
        input_BT, real_BT = input_BT.to(self.device), real_BT.to(self.device)
        self.decoder, logits_NV = begin(
            self.model, input_BT, real_BT, self.samples, self.max_new_tokens
        )
        self.seen_NV = None
        if self.sampling.repetition_penalty != 1:
            shape = (len(self.prompts), self.model.config.vocab_size)
            seen_BV = torch.zeros(shape, dtype=torch.bool, device=self.device)
            # Padding points at its row's last token, which is seen anyway.
            seen_BV.scatter_(1, torch.where(real_BT.bool(), input_BT, input_BT[:, -1:]), True)
            self.seen_NV = seen_BV.repeat_interleave(self.samples, dim=0)
        return logits_NV

    def _choose(self, logits_NV: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        sampling, plain_NV = self.sampling, logits_NV
        if self.seen_NV is not None:
            logits_NV = penalise(logits_NV, self.seen_NV, sampling.repetition_penalty)
        uniform_N = self.uniform_NT[:, min(step, self.uniform_NT.shape[1] - 1)]
        tokens_N = choose(logits_NV, sampling, uniform_N)
        if self.seen_NV is not None:
            self.seen_NV.scatter_(1, tokens_N[:, None], True)
        scores_N = None
        if self.logprobs:
            scaled_NV = plain_NV.float() / (sampling.temperature or 1.0)
            scores_N = -F.cross_entropy(scaled_NV, tokens_N, reduction="none")
        return tokens_N, scores_N

    def _leave(self, places, stopped, tokens_N) -> tuple[list[int], Tensor, Tensor]:
        """Let stopped rows go, an eighth of the batch at a time (half, where it costs a graph)."""
        keep = [place for place, stop in enumerate(stopped) if not stop]
        if len(keep) > (0.5 if self.graphs else 0.875) * len(places):
            return places, tokens_N, torch.tensor(stopped, device=self.device)
        index = torch.tensor(keep, device=self.device)
        self.decoder.keep(index)
        self.uniform_NT = self.uniform_NT[index]
        if self.seen_NV is not None:
            self.seen_NV = self.seen_NV[index]
        done_N = torch.zeros(len(keep), dtype=torch.bool, device=self.device)
        return [places[place] for place in keep], tokens_N[index], done_N

    def _stop_string(self, old: list[int], new: list[int]) -> int:
        """How many of the new tokens it takes until a stop string is complete; 0 if none is."""
        reach = max(len(stop.encode()) for stop in self.stop_strings)  # a token has a byte or more
        for count in range(1, len(new) + 1):
            written = self.tokenizer.decode((old + new[:count])[-reach - count :])
            if any(stop in written for stop in self.stop_strings):
                return count
        return 0
