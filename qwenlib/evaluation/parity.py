"""Does a model folder mean the same to `transformers` as to this library?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qwenlib.generation import generate
from qwenlib.model import load_pretrained
from qwenlib.tokenizer import Tokenizer
from qwenlib.tokenizer.chat import render

_CONVERSATIONS = (
    [{"role": "user", "content": "What is 2 + 3?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi <|im_end|> there"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ],
)


@dataclass(frozen=True)
class Parity:
    """Agreement of one folder under both libraries; logits_difference is the largest absolute."""

    logits_difference: float
    same_greedy: bool
    same_ids: bool
    same_template: bool


@torch.no_grad()
def compare_with_transformers(
    directory: str | Path, prompts: Sequence[str], new_tokens: int = 16
) -> Parity:
    """Open the folder with AutoModelForCausalLM and AutoTokenizer and compare, in fp32 on the CPU.

    Logits over each prompt, greedy tokens after it, token ids of its text, and the chat template's
    strings with and without a generation prompt.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(str(directory))
    ours = load_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_pretrained(directory)
    stops = (tokenizer.eos_token_id, tokenizer.end_of_text_id)
    difference, same_greedy, same_ids = 0.0, True, True
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        same_ids &= ids == their_tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids_1T = torch.tensor([ids])
        gap = float((ours(ids_1T) - theirs(ids_1T).logits).abs().max())
        difference = difference if gap <= difference else gap  # max() would pass over a NaN
        our_tokens = generate(ours, [ids], new_tokens, eos_ids=stops).completions[0]
        out = theirs.generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=new_tokens,
            do_sample=False,
        )  # fmt: skip
        same_greedy &= our_tokens == out[0, len(ids) :].tolist()
    same_template = all(
        render(messages, prompt, default_system=tokenizer.default_system)
        == their_tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
        for messages in _CONVERSATIONS
        for prompt in (False, True)
    )
    return Parity(difference, same_greedy, same_ids, same_template)
