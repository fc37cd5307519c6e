"""What a configuration costs: parameters, KV-cache bytes and FLOPs, from its numbers alone."""

from dataclasses import dataclass

from qwenlib.model.config import QwenConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part; a tied head is counted once, with the embedding.

    router: gates of the routed experts and of the shared one. idle: weights of the routed experts
    that a token does not visit.
    """

    embedding: int
    attention: int
    ffn: int
    norms: int
    head: int
    router: int = 0
    idle: int = 0

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.non_embedding

    @property
    def non_embedding(self) -> int:
        return self.attention + self.ffn + self.norms + self.router

    @property
    def activated(self) -> int:
        """Parameters that take part in one token's forward pass (all of a dense model's)."""
        return self.total - self.idle

    @property
    def activated_non_embedding(self) -> int:
        return self.non_embedding - self.idle


def parameter_count(config: QwenConfig) -> ParameterCount:
    """Exact counts: q, k, v have biases, nothing else has; two norms a layer and a last one."""
    D, layers, moe = config.hidden_size, config.num_hidden_layers, config.moe
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    embedding = config.vocab_size * D
    sparse = sum(config.is_moe_layer(layer) for layer in range(layers))
    ffn = (layers - sparse) * 3 * D * config.intermediate_size
    router = idle = 0
    if moe is not None:
        expert = 3 * D * moe.moe_intermediate_size
        ffn += sparse * (moe.num_experts * expert + 3 * D * moe.shared_expert_intermediate_size)
        router = sparse * (moe.num_experts + 1) * D
        idle = sparse * (moe.num_experts - moe.num_experts_per_tok) * expert
    return ParameterCount(
        embedding=embedding,
        attention=layers * ((D + 1) * (q + 2 * kv) + q * D),
        ffn=ffn,
        norms=(2 * layers + 1) * D,
        head=0 if config.tie_word_embeddings else embedding,
        router=router,
        idle=idle,
    )


def kv_bytes_per_token(config: QwenConfig, bytes_per_value: int = 2) -> int:
    """Bytes of cache that one token of one sequence occupies (keys and values, all layers)."""
    values_per_layer = 2 * config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * values_per_layer * bytes_per_value


def flops_per_token(config: QwenConfig, context: int, training: bool = False) -> float:
    """Matrix-multiply FLOPs a token: 2 a weight (head included, biases not) plus attention.

    Attention: scores and values, 2 * 2 * H * K for each of the (context + 1) / 2 keys a token sees
    on average. Of routed experts only the visited ones count. Training counts the backward pass as
    twice the forward.
    """
    count = parameter_count(config)
    head = config.vocab_size * config.hidden_size
    biased_heads = config.num_attention_heads + 2 * config.num_key_value_heads
    biases = config.num_hidden_layers * biased_heads * config.head_dim
    weights = count.activated_non_embedding - count.norms - biases + head
    keys = (context + 1) / 2
    scores = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys
    return (2 * weights + scores) * (3 if training else 1)
