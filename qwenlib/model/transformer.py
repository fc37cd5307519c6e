"""The Qwen2.5 transformer (report §2): GQA, QKV bias, RoPE, SwiGLU, pre-norm RMSNorm, MoE layers.

Shapes: B batch, T time, S cached time, D hidden, H query heads, G key/value heads, K head dim,
F ffn, V vocabulary, N tokens, E experts, C chosen experts of a token. Module names are Hugging
Face's, so a released checkpoint loads by name.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qwenlib import kernels
from qwenlib.model.config import QwenConfig
from qwenlib.model.rope import rope_frequencies, rope_tables


class KVCache:
    """Preallocated keys and values of every layer, (B, G, S, K); rows share one write position.

    Rows of unequal length are padded on the left, so that the newest token of each row sits in
    the same column.
    """

    def __init__(
        self, config: QwenConfig, batch_size: int, max_length: int, device=None, dtype=None
    ):
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.max_length = max_length
        self.length = 0  # columns written so far, the same for each layer

    def write(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new columns behind `length`; returns all columns with them, (B, S, G, K)."""
        end = self.length + k_BTGK.shape[1]
        if end > self.max_length:
            raise ValueError(f"KV cache holds {self.max_length} tokens, {end} needed")
        self.keys[layer][:, :, self.length : end] = k_BTGK.transpose(1, 2)
        self.values[layer][:, :, self.length : end] = v_BTGK.transpose(1, 2)
        k_BGSK, v_BGSK = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        return k_BGSK.transpose(1, 2), v_BGSK.transpose(1, 2)

    def reorder(self, rows: Tensor, max_length: int | None = None) -> None:
        """Keep the given rows, in their order (repeats share a prefill among samples).

        max_length changes the room; it must hold what is written.
        """
        self.max_length = max_length or self.max_length
        self.keys = [self._rows_of(tensor, rows) for tensor in self.keys]
        self.values = [self._rows_of(tensor, rows) for tensor in self.values]

    def _rows_of(self, old_BGSK: Tensor, rows: Tensor) -> Tensor:
        _, G, _, K = old_BGSK.shape
        new_BGSK = old_BGSK.new_zeros(len(rows), G, self.max_length, K)
        new_BGSK[:, :, : self.length] = old_BGSK[rows, :, : self.length]
        return new_BGSK


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return kernels.rms_norm(x_BTD, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with biases on q, k, v and none on the output."""

    def __init__(self, config: QwenConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=True)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x_BTD, rope, mask_B1TS, cache: KVCache | None) -> Tensor:
        q_BTHK, k_BTGK, v_BTGK = (
            project(x_BTD).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BTHK = kernels.apply_rope(q_BTHK, *rope)
        k_BTGK = kernels.apply_rope(k_BTGK, *rope)
        if cache is not None:
            k_BTGK, v_BTGK = cache.write(self.layer, k_BTGK, v_BTGK)
        out_BTHK = kernels.attention(q_BTHK, k_BTGK, v_BTGK, mask_B1TS)
        return self.o_proj(out_BTHK.flatten(2))


class MLP(nn.Module):
    """SwiGLU feed-forward; intermediate_size is the config's unless another is given."""

    def __init__(self, config: QwenConfig, intermediate_size: int | None = None):
        super().__init__()
        F_size = intermediate_size or config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, F_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, F_size, bias=False)
        self.down_proj = nn.Linear(F_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(kernels.swiglu(self.gate_proj(x_BTD), self.up_proj(x_BTD)))


class Experts(nn.Module):
    """Weights of all routed experts of a layer; gate and up lie stacked, as one product needs."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        E, width = config.moe.num_experts, config.moe.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(E, config.hidden_size, width))


class MoE(nn.Module):
    """Routed experts beside a shared expert behind its own sigmoid gate (report §2).

    Gates are a softmax over *all* routed experts in fp32, of which the largest C are used as they
    are (Qwen2 report, eq. 1 and 2): renormalising them would be another network.
    """

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.top_k = config.moe.num_experts_per_tok
        self.renormalise = config.moe.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.moe.num_experts, bias=False)
        self.experts = Experts(config)
        self.shared_expert = MLP(config, config.moe.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, -2)
        gates_NC, experts_NC = self.route(self.gate(x_ND))
        routed_ND = kernels.expert_ffn(
            x_ND, self.experts.gate_up_proj, self.experts.down_proj, experts_NC,
            gates_NC.to(x_ND.dtype),
        )  # fmt: skip
        shared_ND = self.shared_expert(x_ND) * self.shared_expert_gate(x_ND).sigmoid()
        return (routed_ND + shared_ND).view_as(x_BTD)

    def route(self, router_logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Gates (fp32) and numbers of each token's chosen experts, both (N, C)."""
        gates_NC, experts_NC = router_logits_NE.float().softmax(-1).topk(self.top_k)
        if self.renormalise:
            gates_NC = gates_NC / gates_NC.sum(-1, keepdim=True)
        return gates_NC, experts_NC


class Block(nn.Module):
    def __init__(self, config: QwenConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.is_moe_layer(layer) else MLP(config)

    def forward(self, x_BTD, rope, mask_B1TS, cache: KVCache | None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, mask_B1TS, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Embeddings, blocks and the last norm: what Hugging Face calls `model.model`."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen(nn.Module):
    """A Qwen2.5 language model, dense or (config.moe) with mixture-of-experts layers.

    With `gradient_checkpointing` set, blocks keep only their input for the backward pass and run
    again there.

    Args of `forward`:
        input_ids_BT: token ids.
        position_ids_BT: RoPE positions; default 0 … T-1, or each row's count of real tokens when
            an attention mask is given, or behind the cache.
        document_ids_BT: packed rows; a token sees only tokens of its own document (-1 = padding).
        attention_mask_BS: 1 for real tokens over cache and input; padding on either side.
        cache: `KVCache` to read and extend.
    Returns logits (B, T, V).
    """

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.gradient_checkpointing = False
        # Plain attributes, not buffers: they follow from the config alone and must survive a
        # construction on the meta device.
        with torch.device("cpu"):
            self.rope_frequencies, self.rope_factor = rope_frequencies(config)

    @torch.no_grad()
    def initialise(self, seed: int) -> "Qwen":
        """Normal(0, initializer_range) for matrices, zero biases, gains of one; seeded."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                draw = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(draw * self.config.initializer_range)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return self

    def hidden(
        self, input_ids_BT, position_ids_BT=None, document_ids_BT=None, attention_mask_BS=None,
        cache: KVCache | None = None,
    ) -> Tensor:  # fmt: skip
        """The last norm's output (B, T, D), for heads other than the vocabulary's."""
        past = 0 if cache is None else cache.length
        B, T = input_ids_BT.shape
        device = input_ids_BT.device
        if position_ids_BT is None:
            if attention_mask_BS is not None:
                counts_BS = attention_mask_BS.long().cumsum(-1) - 1
                position_ids_BT = counts_BS.clamp(min=0)[:, past : past + T]
            else:
                position_ids_BT = torch.arange(past, past + T, device=device).expand(B, T)
        mask_B1TS = attention_mask(T, past, document_ids_BT, attention_mask_BS, device)
        x_BTD = self.model.embed_tokens(input_ids_BT)
        rope = rope_tables(position_ids_BT, self.rope_frequencies, self.rope_factor, x_BTD.dtype)
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.model.layers:
            if again:
                x_BTD = checkpoint(block, x_BTD, rope, mask_B1TS, cache, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rope, mask_B1TS, cache)
        if cache is not None:
            cache.length += T
        return self.model.norm(x_BTD)

    def forward(
        self, input_ids_BT, position_ids_BT=None, document_ids_BT=None, attention_mask_BS=None,
        cache: KVCache | None = None,
    ) -> Tensor:  # fmt: skip
        x_BTD = self.hidden(
            input_ids_BT, position_ids_BT, document_ids_BT, attention_mask_BS, cache
        )
        return F.linear(x_BTD, self.lm_head.weight)


def attention_mask(T: int, past: int, document_ids_BT, attention_mask_BS, device) -> Tensor | None:
    """True where query t (column past + t) may look: not ahead, real keys, its own document.

    None when plain causal attention says the same, so that the fast path can be taken.
    """
    if document_ids_BT is None and attention_mask_BS is None:
        if past == 0:
            return None
        if T == 1:
            return torch.ones(1, 1, 1, past + 1, dtype=torch.bool, device=device)
    columns_S = torch.arange(past + T, device=device)
    mask = columns_S <= columns_S[past:, None]
    mask_B1TS = mask[None, None]
    if attention_mask_BS is not None:
        mask_B1TS = mask_B1TS & attention_mask_BS.bool()[:, None, None, : past + T]
    if document_ids_BT is not None:
        if past:
            raise ValueError("packed documents cannot continue a KV cache; run them one a row")
        same_BTS = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
        real_BTS = (document_ids_BT >= 0)[:, None, :]
        mask_B1TS = mask_B1TS & (same_BTS & real_BTS)[:, None]
    return mask_B1TS
