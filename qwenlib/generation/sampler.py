"""Batched generation with a preallocated KV cache.

Shapes: B prompts, N = B * samples rows, T time, S cache, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qwenlib.model.transformer import KVCache


@dataclass(frozen=True)
class Generation:
    """completions[i]: new token ids of row i, stop token included; rows of a prompt lie together.

    finished[i]: whether row i ended with a stop token rather than at the length limit.
    """

    completions: list[list[int]]
    finished: list[bool]


@torch.no_grad()
def generate(
    model, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 0.0,
    top_p: float = 1.0, top_k: int = 0, samples: int = 1, seed: int = 0,
    eos_ids: tuple[int, ...] | list[int] = (), batch_size: int = 256,
) -> Generation:  # fmt: skip
    """Continue each prompt `samples` times; temperature 0 is greedy.

    Prompts are padded on the left and prefilled once for all their samples. Rows that have stopped
    leave the batch, some at a time. The draw depends on (seed, batch composition) only.
    Raises ValueError for an empty prompt or a max_new_tokens below 1.
    """
    if not prompts:
        return Generation([], [])
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty; start it with a control token such as <|endoftext|>")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    was_training = model.training
    model.eval()
    completions: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
    finished = [False] * len(completions)
    # Prompts of like length together waste the least padding; the order is undone below.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_batch = max(1, batch_size // samples)
    for start in range(0, len(order), per_batch):
        chosen = order[start : start + per_batch]
        rows, done = _generate_batch(
            model, [prompts[i] for i in chosen], max_new_tokens, temperature, top_p, top_k,
            samples, generator, tuple(eos_ids),
        )  # fmt: skip
        for place, prompt in enumerate(chosen):
            for s in range(samples):
                completions[prompt * samples + s] = rows[place * samples + s]
                finished[prompt * samples + s] = done[place * samples + s]
    model.train(was_training)
    return Generation(completions, finished)


def _generate_batch(
    model, prompts, max_new_tokens, temperature, top_p, top_k, samples, generator, eos_ids
) -> tuple[list[list[int]], list[bool]]:
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    input_BT = torch.zeros(len(prompts), width, dtype=torch.long)
    real_BT = torch.zeros(len(prompts), width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        input_BT[i, width - len(prompt) :] = torch.tensor(prompt)
        real_BT[i, width - len(prompt) :] = 1
    input_BT, real_BT = input_BT.to(device), real_BT.to(device)
    dtype = next(model.parameters()).dtype
    cache = KVCache(model.config, len(prompts), width + max_new_tokens, device, dtype)
    hidden_BTD = model.hidden(input_BT, attention_mask_BS=real_BT, cache=cache)
    logits_NV = model.lm_head(hidden_BTD[:, -1])
    rows_N = torch.arange(len(prompts), device=device).repeat_interleave(samples)
    cache.reorder(rows_N)
    logits_NV, real_NS = logits_NV[rows_N], real_BT[rows_N]
    active = list(range(len(rows_N)))  # the row in each place of the batch
    out: list[list[int]] = [[] for _ in active]
    done = [False] * len(active)
    for step in range(max_new_tokens):
        next_N = sample_tokens(logits_NV, temperature, top_p, top_k, generator)
        keep = []
        for place, token in enumerate(next_N.tolist()):
            row = active[place]
            if done[row]:
                continue
            out[row].append(token)
            if token in eos_ids:
                done[row] = True
            else:
                keep.append(place)
        if not keep or step + 1 == max_new_tokens:
            break
        # Leaving copies the cache, so rows wait until an eighth of the batch can go.
        if len(keep) <= 0.875 * len(active):
            active = [active[place] for place in keep]
            index = torch.tensor(keep, device=device)
            next_N, real_NS = next_N[index], real_NS[index]
            cache.reorder(index)
        real_NS = torch.cat((real_NS, real_NS.new_ones(len(active), 1)), dim=1)
        logits_NV = model(next_N[:, None], attention_mask_BS=real_NS, cache=cache)[:, -1]
    return out, done


def sample_tokens(
    logits_NV: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator
) -> Tensor:
    """One token a row: greedy at temperature 0, else from the tempered, truncated distribution.

    top_p keeps the smallest set of likeliest tokens whose mass reaches it (1 keeps all); top_k
    keeps the k likeliest (0 keeps all).
    """
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            f"need temperature >= 0, 0 < top_p <= 1, top_k >= 0; got {temperature}, {top_p}, "
            f"{top_k}"
        )
    if temperature == 0:
        return logits_NV.argmax(-1)
    logits_NV = logits_NV.float() / temperature
    if top_k:
        kth_N1 = logits_NV.topk(min(top_k, logits_NV.shape[-1])).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < kth_N1, float("-inf"))
    if top_p < 1:
        sorted_NV, index_NV = logits_NV.sort(descending=True)
        before_NV = sorted_NV.softmax(-1).cumsum(-1) - sorted_NV.softmax(-1)
        sorted_NV = sorted_NV.masked_fill(before_NV >= top_p, float("-inf"))
        logits_NV = torch.empty_like(logits_NV).scatter(-1, index_NV, sorted_NV)
    return torch.multinomial(logits_NV.softmax(-1), 1, generator=generator).squeeze(-1)
