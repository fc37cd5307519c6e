"""The shapes and the cases of `qwenlib bench`."""

from functools import partial

import torch

from qwenlib.bench.cases import Case, SkipCase, decode, forward, prefill, train
from qwenlib.bench.models import draw
from qwenlib.bench.text import encode
from qwenlib.bench.text import train as train_tokenizer
from qwenlib.bench.train import training
from qwenlib.model import Qwen, QwenConfig
from qwenlib.model.presets import PRESETS

# 1.44 and 6.17 million parameters.
SMALL = QwenConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    rope_theta=10_000.0, tie_word_embeddings=True,
)  # fmt: skip
MEDIUM = SMALL.replace(
    hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=8
)
REAL = SMALL.replace(vocab_size=151_936)  # 20.6 million
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}  # the released generation_config.json


def smollm2(device: torch.device, dtype: torch.dtype) -> Qwen:
    """The released SmolLM2-135M-Instruct weights."""
    from qwenlib.assets import AssetError
    from qwenlib.model.checkpoint import load_pretrained
    from qwenlib.model.sources import resolve_model

    try:
        folder = resolve_model("smollm2-135m")
    except (AssetError, OSError) as error:
        raise SkipCase(f"needs SmolLM2's weights: {error}") from error
    return load_pretrained(folder, device=device, dtype=dtype).eval()


def half_billion(device: torch.device, dtype: torch.dtype) -> Qwen:
    """A drawn model of Qwen2.5-0.5B's shape, on a GPU only."""
    if device.type != "cuda":
        raise SkipCase("needs a GPU")
    return draw(PRESETS["0.5b"], 0, device, dtype)


def mixture(device: torch.device, dtype: torch.dtype) -> Qwen:
    """Four layers of 16 experts, 4 a token, and a shared one; 9.7 million parameters."""
    from qwenlib.model.config import MoEConfig

    moe = MoEConfig(
        num_experts=16, num_experts_per_tok=4, moe_intermediate_size=128,
        shared_expert_intermediate_size=512,
    )  # fmt: skip
    return draw(MEDIUM.replace(num_hidden_layers=4, moe=moe), 0, device, dtype)


_small, _medium = partial(draw, SMALL, 0), partial(draw, MEDIUM, 0)
_BATCH = {"rows": 32, "prompt_tokens": (8, 24), "new_tokens": 64}
_TEXT = {"code": 2, "prose": 2, "languages": 1}  # MB of each source
_STEPS = {"rows": 16, "tokens": 128, "micro_rows": 8}  # of chapter 06
_FEWER = {"rows": 8, "tokens": 128, "micro_rows": 4}
_SINGLE = {"rows": 1, "prompt_tokens": (32, 32), "bandwidth": True}

CASES = (
    Case("decode-1m", "generate", "greedy, 32 prompts x 64 tokens, 1.4 M parameters", decode,
         {"model": _small, **_BATCH}),
    Case("decode-6m", "generate", "greedy, 32 prompts x 64 tokens, 6.2 M parameters", decode,
         {"model": _medium, **_BATCH}),
    Case("sample-1m", "generate", "sampled, 32 prompts x 64 tokens, 1.4 M parameters", decode,
         {"model": _small, "sampling": SAMPLING, **_BATCH}),
    Case("sample-6m", "generate", "sampled, 32 prompts x 64 tokens, 6.2 M parameters", decode,
         {"model": _medium, "sampling": SAMPLING, **_BATCH}),
    Case("group-1m", "generate", "8 samples each of 8 prompts x 64 tokens, 1.4 M", decode,
         {"model": _small, "sampling": SAMPLING, "rows": 8, "prompt_tokens": (64, 128),
          "new_tokens": 64, "samples": 8}),
    Case("decode-smollm2", "generate", "greedy, 1 prompt x 64 tokens, SmolLM2-135M", decode,
         {"model": smollm2, "new_tokens": 64, **_SINGLE}),
    Case("decode-0.5b", "generate", "greedy, 1 prompt x 256 tokens, Qwen2.5-0.5B's shape", decode,
         {"model": half_billion, "new_tokens": 256, **_SINGLE}),
    Case("prefill-6m-1x512", "generate", "1 prompt of 512 tokens, 6.2 M parameters", prefill,
         {"model": _medium, "rows": 1, "tokens": 512}),
    Case("prefill-6m-8x128", "generate", "8 prompts of 128 tokens, 6.2 M parameters", prefill,
         {"model": _medium, "rows": 8, "tokens": 128}),
    Case("prefill-smollm2-1x512", "generate", "1 prompt of 512 tokens, SmolLM2-135M", prefill,
         {"model": smollm2, "rows": 1, "tokens": 512}),
    Case("prefill-smollm2-8x128", "generate", "8 prompts of 128 tokens, SmolLM2-135M", prefill,
         {"model": smollm2, "rows": 8, "tokens": 128}),
    Case("forward-6m", "forward", "logits of 8 x 256 tokens, 6.2 M parameters", forward,
         {"model": _medium, "rows": 8, "tokens": 256}),
    Case("train-1m", "forward", "forward and backward, 8 x 256 tokens, 1.4 M", train,
         {"model": _small, "rows": 8, "tokens": 256}),
    Case("train-6m", "forward", "forward and backward, 8 x 256 tokens, 6.2 M", train,
         {"model": _medium, "rows": 8, "tokens": 256}),
    Case("forward-moe", "forward", "logits of 8 x 256 tokens, 16 experts, 4 a token", forward,
         {"model": mixture, "rows": 8, "tokens": 256}),
    Case("train-moe", "forward", "forward and backward, 8 x 256 tokens, 16 experts", train,
         {"model": mixture, "rows": 8, "tokens": 256}),
    Case("loop-2k", "train", "16 x 128 tokens a step, 2,048 words, fp32", training,
         {"config": SMALL, "steps": 8, **_STEPS}),
    Case("loop-2k-bf16", "train", "16 x 128 tokens a step, 2,048 words, bf16", training,
         {"config": SMALL, "steps": 8, "autocast": "bfloat16", **_STEPS}),
    Case("loop-152k", "train", "8 x 128 tokens a step, 151,936 words, fp32", training,
         {"config": REAL, "steps": 2, **_FEWER}, most_rounds=5),
    Case("loop-152k-bf16", "train", "8 x 128 tokens a step, 151,936 words, bf16", training,
         {"config": REAL, "steps": 2, "autocast": "bfloat16", **_FEWER}, most_rounds=5),
    Case("encode-each", "tokenizer", "5 MB of documents, one call each, one thread", encode,
         {"megabytes": _TEXT, "library": "transformers", "batch": False}),
    Case("encode-batch", "tokenizer", "5 MB of documents in one call", encode,
         {"megabytes": _TEXT, "library": "tokenizers", "batch": True}),
    Case("encode-each-rust", "tokenizer", "5 MB of documents, one call each, one thread", encode,
         {"megabytes": _TEXT, "library": "tokenizers", "batch": False}),
    Case("encode-batch-transformers", "tokenizer", "5 MB of documents in one call", encode,
         {"megabytes": _TEXT, "library": "transformers", "batch": True}),
    Case("train-16k", "tokenizer", "16,384 rows from 50 MB of source and manuals", train_tokenizer,
         {"megabytes": 50, "vocab_size": 16_384}, most_rounds=5),
)  # fmt: skip
