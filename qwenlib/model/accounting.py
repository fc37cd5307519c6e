"""What a configuration costs: parameters, KV-cache bytes and FLOPs, from its numbers alone."""

from dataclasses import dataclass

from qwenlib.model.config import QwenConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part; a tied head is counted once, with the embedding."""

    embedding: int
    attention: int
    ffn: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.ffn + self.norms + self.head

    @property
    def non_embedding(self) -> int:
        return self.attention + self.ffn + self.norms


def parameter_count(config: QwenConfig) -> ParameterCount:
    """Exact counts: q, k, v have biases, o and the FFN none; two norms a layer and a last one."""
    D, F, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    embedding = config.vocab_size * D
    return ParameterCount(
        embedding=embedding,
        attention=layers * ((D + 1) * (q + 2 * kv) + q * D),
        ffn=layers * 3 * D * F,
        norms=(2 * layers + 1) * D,
        head=0 if config.tie_word_embeddings else embedding,
    )


def kv_bytes_per_token(config: QwenConfig, bytes_per_value: int = 2) -> int:
    """Bytes of cache that one token of one sequence occupies (keys and values, all layers)."""
    values_per_layer = 2 * config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * values_per_layer * bytes_per_value


def flops_per_token(config: QwenConfig, context: int, training: bool = False) -> float:
    """Matrix-multiply FLOPs a token: 2 a weight (head included, biases not) plus attention.

    Attention: scores and values, 2 * 2 * H * K for each of the (context + 1) / 2 keys a token sees
    on average. Training counts the backward pass as twice the forward.
    """
    count = parameter_count(config)
    head = config.vocab_size * config.hidden_size
    biased_heads = config.num_attention_heads + 2 * config.num_key_value_heads
    biases = config.num_hidden_layers * biased_heads * config.head_dim
    weights = count.attention - biases + count.ffn + head
    keys = (context + 1) / 2
    scores = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys
    return (2 * weights + scores) * (3 if training else 1)
