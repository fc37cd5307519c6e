"""The released shapes (report table 1, config.json of each release) and teaching sizes.

`find("7b")` is a base model, `find("7b-instruct")` its instruct release, `find("moe-a2.7b")` a
mixture of experts, `find("teach-2m")` a size for a laptop.
"""

import difflib

from qwenlib.model.config import MoEConfig, QwenConfig


def _released(layers, hidden, ffn, heads, kv_heads, vocab, tied, positions, eps) -> QwenConfig:
    return QwenConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rope_theta=1_000_000.0,
        rms_norm_eps=eps,
        tie_word_embeddings=tied,
    )


# Base models. The 14B, 32B and 72B releases carry rms_norm_eps 1e-5, the others 1e-6.
PRESETS: dict[str, QwenConfig] = {
    "0.5b": _released(24, 896, 4864, 14, 2, 151_936, True, 32_768, 1e-6),
    "1.5b": _released(28, 1536, 8960, 12, 2, 151_936, True, 131_072, 1e-6),
    "3b": _released(36, 2048, 11_008, 16, 2, 151_936, True, 32_768, 1e-6),
    "7b": _released(28, 3584, 18_944, 28, 4, 152_064, False, 131_072, 1e-6),
    "14b": _released(48, 5120, 13_824, 40, 8, 152_064, False, 131_072, 1e-5),
    "32b": _released(64, 5120, 27_648, 40, 8, 152_064, False, 131_072, 1e-5),
    "72b": _released(80, 8192, 29_568, 64, 8, 152_064, False, 131_072, 1e-5),
}

# Every instruct release has eps 1e-6 and 32,768 positions; YaRN is switched on for more.
INSTRUCT: dict[str, QwenConfig] = {
    f"{name}-instruct": config.replace(max_position_embeddings=32_768, rms_norm_eps=1e-6)
    for name, config in PRESETS.items()
}

# Turbo and Plus are undisclosed; these are the published models whose recipe they follow.
MOE: dict[str, QwenConfig] = {
    # Qwen1.5-MoE-A2.7B: dense FFN of 5,632 cut four ways, "4 shared" experts in one wide one.
    "moe-a2.7b": _released(24, 2048, 5632, 16, 16, 151_936, False, 8192, 1e-6).replace(
        moe=MoEConfig(60, 4, 1408, 5632)
    ),
    # Qwen2-57B-A14B, upcycled from Qwen2-7B.
    "moe-57b-a14b": _released(28, 3584, 18_944, 28, 4, 151_936, False, 131_072, 1e-6).replace(
        moe=MoEConfig(64, 8, 2560, 20_480)
    ),
}


def _teaching(layers, hidden, ffn, heads, kv_heads, vocab) -> QwenConfig:
    shape = _released(layers, hidden, ffn, heads, kv_heads, vocab, True, 4096, 1e-6)
    return shape.replace(rope_theta=10_000.0)


# Ours, named by parameters. Every dimension is a multiple of 64, so that tiles of a GPU fill; the
# first two go with the walk's own vocabulary of 2,048, the others with the real one.
TEACHING: dict[str, QwenConfig] = {
    "teach-2m": _teaching(6, 128, 512, 2, 1, 2048),
    "teach-5m": _teaching(6, 256, 768, 4, 2, 2048),
    "teach-110m": _teaching(12, 512, 1408, 8, 2, 151_936),
    "teach-260m": _teaching(16, 768, 3072, 12, 4, 151_936),
    "teach-moe-4m": _teaching(6, 128, 512, 2, 1, 2048).replace(moe=MoEConfig(16, 4, 64, 256)),
}

# Report table 1 and the release notes, in billions: (total, without embeddings).
PUBLISHED_BILLIONS: dict[str, tuple[float, float]] = {
    "0.5b": (0.49, 0.36), "1.5b": (1.54, 1.31), "3b": (3.09, 2.77), "7b": (7.61, 6.53),
    "14b": (14.7, 13.1), "32b": (32.5, 31.0), "72b": (72.7, 70.0),
}  # fmt: skip

# Release notes of the two MoE models, in billions: (total, activated).
PUBLISHED_MOE_BILLIONS: dict[str, tuple[float, float]] = {
    "moe-a2.7b": (14.3, 2.7), "moe-57b-a14b": (57.0, 14.0),
}  # fmt: skip


def names() -> list[str]:
    """All presets that `find` knows."""
    return [*PRESETS, *INSTRUCT, *MOE, *TEACHING]


def find(name: str) -> QwenConfig:
    """The configuration of a preset; raises ValueError naming the nearest for an unknown one."""
    known = PRESETS | INSTRUCT | MOE | TEACHING
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f": did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"no preset {name!r}{hint} Known: {', '.join(known)}")
