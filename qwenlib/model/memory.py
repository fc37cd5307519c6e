"""Memory by kind, and what a training step keeps for its backward pass, tensor by tensor.

Symbols: D hidden, F ffn, H query heads, G key/value heads, K head dim, V vocabulary; e bytes of an
activation; MoE: E experts, C chosen ones, U width of an expert, S width of the shared one.
"""

from collections.abc import Collection
from dataclasses import astuple, dataclass

from qwenlib.model.config import QwenConfig


@dataclass(frozen=True)
class Recipe:
    """Bytes a parameter (moments: AdamW's two together), bytes of an activation, share of FLOP/s.

    "mixed" is ZeRO's 16 bytes a parameter (arXiv 1910.02054, §3.1) with bf16 for fp16; in "bf16"
    AdamW's moments take the weights' dtype; "fp32" multiplies in TF32, at half of bf16's FLOP/s.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    activations: int
    speed: float


RECIPES: dict[str, Recipe] = {
    "mixed": Recipe(2, 2, 4, 8, 2, 1.0),
    "bf16": Recipe(2, 2, 0, 4, 2, 1.0),
    "fp32": Recipe(4, 4, 0, 8, 4, 0.5),
}
CHECKPOINTINGS = ("none", "selective", "full")
KERNELS = ("fused", "reference")
LOGIT_BYTES = 12  # see `loss_bytes`
_COMPUTED_AGAIN = ("normed", "normed middle", "product", "visits", "expert product")  # "selective"


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes on one GPU. `logits` and `working` never live together: the total takes the larger.

    gathered: unsharded weights and gradients in flight (FSDP). working: what one block's backward
    pass (training), or a chunk of prompts in a block (serving), needs besides what is kept.
    """

    weights: float = 0.0
    gradients: float = 0.0
    masters: float = 0.0
    moments: float = 0.0
    gathered: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    working: float = 0.0
    kv_cache: float = 0.0

    @property
    def total(self) -> float:
        return sum(astuple(self)) - min(self.logits, self.working)


def stored_tensors(
    config: QwenConfig, layer: int = 0, element: int = 2, kernels: str = "fused",
    checkpointing: str = "none",
) -> dict[str, int]:  # fmt: skip
    """Bytes a token that one block keeps for its backward pass, tensor by tensor.

    The method of arXiv 2205.05198, §4, for this block: no dropout masks, and no T x T scores
    (flash attention, arXiv 2205.14135, keeps q, k, v, its output and one fp32 number a head).

        tensor              fused       reference adds      kept for
        block input         eD + 4      4D (fp32 copy)      first norm (and 1/rms in fp32)
        normed              eD                              weights of q, k, v
        q                   eHK                             scores, after RoPE
        k, v                2 eGK                           scores and sums
        attention           eHK + 4H                        o's weights; flash attention
        middle              eD + 4      4D (fp32 copy)      second norm
        normed middle       eD                              weights of gate, up and router
        gate, up            2 eF                            SwiGLU
        silu                            eF                  its product
        product             eF                              down's weights
      in a MoE layer F is S, the shared expert's, and there are besides
        router              4E + 16C    8C (order twice)    softmax; choice and order of visits
        visits              eCD                             experts' gate and up
        expert gate, up     2 eCU                           SwiGLU
        expert silu                     eCU                 its product
        expert product      eCU                             experts' down
        expert outputs      eCD + eC    eCD (both orders)   the gates
        shared output       eD + e                          the shared expert's gate

    With G = H, HK = D and 3F = 8D the fused column is the paper's 34 bytes a hidden unit less two
    for dropout masks (bf16; 1/rms and the numbers a head aside). "reference" is `qwenlib.kernels`
    on a CPU, which a test measures to the byte; the fused column assumes kernels that keep only
    their inputs. "full" checkpointing keeps the block's input alone. "selective" keeps the outputs
    of matrix products and attention (the second norm's input stands for o's) and runs all else
    again; the paper's own choice, the scores, is flash attention's already. Raises ValueError for
    an unknown choice.
    """
    _known("kernels", kernels, KERNELS)
    _known("checkpointing", checkpointing, CHECKPOINTINGS)
    e, D, selective = element, config.hidden_size, checkpointing == "selective"
    if checkpointing == "full":
        return {"block input": e * D}
    lean = selective or kernels == "fused"
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    norm_input = e * D + (0 if selective else 4) + (0 if lean else 4 * D)
    moe = config.moe if config.is_moe_layer(layer) else None
    F = config.intermediate_size if moe is None else moe.shared_expert_intermediate_size
    kept = {
        "block input": norm_input, "normed": e * D, "q": e * q, "k, v": 2 * e * kv,
        "attention": e * q + 4 * config.num_attention_heads, "middle": norm_input,
        "normed middle": e * D, "gate, up": 2 * e * F, "silu": 0 if lean else e * F,
        "product": e * F,
    }  # fmt: skip
    if moe is not None:
        E, C, U = moe.num_experts, moe.num_experts_per_tok, moe.moe_intermediate_size
        kept |= {
            "router": 4 * E + (16 if lean else 24) * C, "visits": e * C * D,
            "expert gate, up": 2 * e * C * U, "expert silu": 0 if lean else e * C * U,
            "expert product": e * C * U, "expert outputs": e * C * (D * (1 if lean else 2) + 1),
            "shared output": e * (D + 1),
        }  # fmt: skip
    again = _COMPUTED_AGAIN if selective else ()
    return {name: size for name, size in kept.items() if size and name not in again}


def activation_bytes(
    config: QwenConfig, tokens: int, element: int = 2, kernels: str = "fused",
    checkpointing: str = "none",
) -> tuple[int, int]:  # fmt: skip
    """Bytes kept between the passes, and the most that one block's backward pass adds to them.

    Outside the blocks: the ids (int64), RoPE's cos and sin (2 eK), the last norm's input and
    output. A block's backward adds the gradients of gate and up, and what it computes again.
    """
    kept = working = 0
    for layer in range(config.num_hidden_layers):
        whole = stored_tensors(config, layer, element, kernels)
        part = sum(stored_tensors(config, layer, element, kernels, checkpointing).values())
        gradients = sum(size for name, size in whole.items() if name.endswith("gate, up"))
        kept += part
        working = max(working, sum(whole.values()) - part + gradients)
    last_norm = 2 * element * config.hidden_size + 4
    last_norm += 0 if kernels == "fused" else 4 * config.hidden_size
    outside = 8 + 2 * element * config.head_dim + last_norm
    return tokens * (kept + outside), tokens * working


def loss_bytes(config: QwenConfig, tokens: int, chunk: int = 0, element: int = 2) -> int:
    """Bytes of the head's buffers at their largest moment, in the loss's backward pass.

    12 V a token: log-probabilities, their gradient and the logits' gradient, all fp32. With a
    chunked linear cross-entropy (chunk > 0 tokens) those of one chunk, and the gradient of the
    hidden states, which is made during the forward pass.
    """
    if chunk == 0:
        return tokens * LOGIT_BYTES * config.vocab_size
    rows = min(chunk, tokens)
    return rows * LOGIT_BYTES * config.vocab_size + tokens * element * config.hidden_size


def _known(what: str, name: str, choices: Collection[str]) -> None:
    if name not in choices:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(choices)}")
