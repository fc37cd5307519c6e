"""The seven dense Qwen2.5 sizes (report table 1 and released config.json) and teaching sizes."""

from qwenlib.model.config import QwenConfig


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

# Report table 1 and the release notes, in billions: (total, without embeddings).
PUBLISHED_BILLIONS: dict[str, tuple[float, float]] = {
    "0.5b": (0.49, 0.36), "1.5b": (1.54, 1.31), "3b": (3.09, 2.77), "7b": (7.61, 6.53),
    "14b": (14.7, 13.1), "32b": (32.5, 31.0), "72b": (72.7, 70.0),
}  # fmt: skip
