"""The model at one token a row: the numbers of `Qwen.forward` with a cache, laid out for speed.

Shapes: N rows, D hidden, H query heads, G key/value heads, K head dim, S cache, F ffn, V
vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwenlib import kernels
from qwenlib.kernels import native
from qwenlib.model.rope import rope_tables
from qwenlib.model.transformer import MLP, KVCache, Qwen

_BUCKET = 256  # columns that the first graph reads; each next one reads twice as many
# Prompts longer than this go through PyTorch: its attention takes many queries at a time.
_NATIVE_PROMPT = 1024


@torch.no_grad()
def begin(
    model: Qwen, input_BT: Tensor, real_BT: Tensor, samples: int, max_new_tokens: int
) -> tuple["Decoder | NativeDecoder", Tensor]:
    """Read left-padded prompts once for all their samples.

    Returns a decoder over N = B * samples rows, those of a prompt side by side, with room for
    max_new_tokens - 1 steps, and the logits (N, V) of each row's first new token.
    """
    B, T = input_BT.shape
    device, dtype = input_BT.device, model.model.embed_tokens.weight.dtype
    cache = KVCache(model.config, B, T, device, dtype)
    rows_N = torch.arange(B, device=device).repeat_interleave(samples)
    room = T + max_new_tokens
    forward = native_forward(model, room)
    if forward is not None and T <= _NATIVE_PROMPT:
        row_M, column_M = real_BT.nonzero().unbind(1)
        last_B = real_BT.sum(1).cumsum(0) - 1
        logits_BV = forward(
            input_BT[row_M, column_M], row_M.contiguous(), column_M.contiguous(),
            T - real_BT.sum(1), last_B, cache.keys, cache.values,
        )  # fmt: skip
        cache.length = T
    else:
        padded = not bool(real_BT.all())
        mask_BT = real_BT if padded else None
        hidden_BTD = model.hidden(input_BT, attention_mask_BS=mask_BT, cache=cache)
        logits_BV = kernels.linear(hidden_BTD[:, -1], model.lm_head.weight)
    cache.reorder(rows_N, max_length=room)
    real_NT = real_BT[rows_N]
    if forward is not None:
        decoder = NativeDecoder(cache, real_NT, forward)
    elif device.type == "cuda":
        decoder = GraphedDecoder(model, cache, real_NT)
    else:
        decoder = Decoder(model, cache, real_NT)
    return decoder, logits_BV[rows_N]


class Decoder:
    """Continues a prefilled cache, token by token, for N rows at once.

    real_NS marks the prompts' real tokens (padding on the left). With `fixed` every step has the
    same shapes and no number of the host in it, as a CUDA graph needs: it reads `columns` columns
    of the cache, those to come masked.
    """

    def __init__(self, model: Qwen, cache: KVCache, real_NS: Tensor, fixed: bool = False):
        config = model.config
        self.model, self.cache, self.fixed = model, cache, fixed
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.blocks = [_Weights(block) for block in model.model.layers]
        dtype, device = model.model.embed_tokens.weight.dtype, real_NS.device
        positions_1S = torch.arange(cache.max_length, device=device)[None]
        cos, sin = rope_tables(positions_1S, model.rope_frequencies, model.rope_factor, dtype)
        self.cos_SK, self.sin_SK = cos[0], sin[0]
        self.positions_N = real_NS.sum(1)
        self.column = torch.tensor([cache.length], device=device)
        self.columns = cache.max_length
        self.bias_N1S = None
        if fixed or not bool(real_NS.all()):
            self.bias_N1S = torch.zeros(len(real_NS), 1, cache.max_length, device=device)
            prompts_N1S = self.bias_N1S[:, :, : cache.length]
            prompts_N1S.masked_fill_(~real_NS.bool()[:, None], -torch.inf)
            self.bias_N1S = self.bias_N1S.to(dtype)

    @torch.no_grad()
    def step(self, tokens_N: Tensor) -> Tensor:
        """Append one token to each row; returns the logits (N, V) of what follows."""
        at = self.cache.length
        if not self.fixed and at >= self.cache.max_length:
            raise ValueError(f"KV cache holds {self.cache.max_length} tokens, {at + 1} needed")
        model = self.model.model
        x_ND = F.embedding(tokens_N, model.embed_tokens.weight)
        rope = self.cos_SK[self.positions_N, None], self.sin_SK[self.positions_N, None]
        bias_N1S = self._bias()
        for layer, block in enumerate(self.blocks):
            x_ND = self._block(x_ND, block, layer, rope, bias_N1S)
        self.positions_N += 1
        if self.fixed:
            self.column += 1
        else:
            self.cache.length += 1
        return kernels.linear(model.norm(x_ND), self.model.lm_head.weight)

    def keep(self, rows: Tensor) -> None:
        """Go on with the given rows alone, in their order."""
        self.cache.reorder(rows)
        self.positions_N = self.positions_N[rows]
        if self.bias_N1S is not None:
            self.bias_N1S = self.bias_N1S[rows]

    def _block(self, x_ND, block: "_Weights", layer: int, rope, bias_N1S) -> Tensor:
        h_ND = kernels.rms_norm(x_ND, block.norm_1, block.eps)
        heads = kernels.linear(h_ND, block.qkv, block.qkv_bias)
        heads = heads.unflatten(1, (self.heads + 2 * self.groups, -1))
        turned, v_NGK = heads.split((self.heads + self.groups, self.groups), dim=1)
        turned = kernels.apply_rope(turned[:, None], *rope)[:, 0]
        q_NHK, k_NGK = turned.split((self.heads, self.groups), dim=1)
        k_NGSK = self._write(self.cache.keys[layer], k_NGK)
        v_NGSK = self._write(self.cache.values[layer], v_NGK)
        out_NHK = kernels.decode_attention(q_NHK, k_NGSK, v_NGSK, bias_N1S)
        x_ND = x_ND + kernels.linear(out_NHK.flatten(1), block.out)
        h_ND = kernels.rms_norm(x_ND, block.norm_2, block.eps)
        if block.moe is not None:
            return x_ND + block.moe(h_ND)
        gate_NF, up_NF = kernels.linear(h_ND, block.gate_up).chunk(2, dim=1)
        return x_ND + kernels.linear(kernels.swiglu(gate_NF, up_NF), block.down)

    def _write(self, cache_NGSK: Tensor, new_NGK: Tensor) -> Tensor:
        if self.fixed:
            cache_NGSK.index_copy_(2, self.column, new_NGK[:, :, None])
            return cache_NGSK[:, :, : self.columns]
        cache_NGSK[:, :, self.cache.length] = new_NGK
        return cache_NGSK[:, :, : self.cache.length + 1]

    def _bias(self) -> Tensor | None:
        if self.bias_N1S is None:
            return None
        if not self.fixed:
            return self.bias_N1S[:, :, : self.cache.length + 1]
        columns_S = torch.arange(self.columns, device=self.column.device)
        return self.bias_N1S[:, :, : self.columns].masked_fill(columns_S > self.column, -torch.inf)


class GraphedDecoder(Decoder):
    """A decoder whose steps are replays of CUDA graphs, one for each doubling of the context."""

    def __init__(self, model: Qwen, cache: KVCache, real_NS: Tensor):
        super().__init__(model, cache, real_NS, fixed=True)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.columns = 0
        self.tokens_N = torch.zeros(len(real_NS), dtype=torch.long, device=real_NS.device)

    def step(self, tokens_N: Tensor) -> Tensor:
        if self.cache.length >= self.cache.max_length:
            raise ValueError(f"KV cache holds {self.cache.max_length} tokens, one more needed")
        self.tokens_N.copy_(tokens_N)
        if self.graph is None or self.cache.length >= self.columns:
            self._capture()
        self.graph.replay()
        self.cache.length += 1  # the host's own count, for the size of the graph alone
        return self.logits_NV

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.tokens_N = self.tokens_N[rows]
        self.graph = None  # it reads the old tensors

    def _capture(self) -> None:
        columns = _BUCKET
        while columns <= self.cache.length:
            columns *= 2
        self.columns = min(columns, self.cache.max_length)
        before = self.positions_N.clone(), self.column.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up outside the graph
            for _ in range(2):
                super().step(self.tokens_N)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits_NV = super().step(self.tokens_N)
        # What the trials wrote into the cache lies at columns that the real steps write again.
        self.positions_N.copy_(before[0])
        self.column.copy_(before[1])


def native_forward(model: Qwen, columns: int) -> native.Forward | None:
    """The model as compiled code for positions below `columns`; None where there is none for it.

    There is for dense models in fp32 on a CPU, whose heads fill vector registers.
    """
    config = model.config
    if config.moe is not None or not native.can_run(list(model.parameters()), config.head_dim):
        return None
    positions_1S = torch.arange(columns)[None]
    cos, sin = rope_tables(positions_1S, model.rope_frequencies, model.rope_factor, torch.float32)
    blocks = [_Weights(block) for block in model.model.layers]
    return native.Forward(
        [(b.norm_1, b.qkv, b.qkv_bias, b.out, b.norm_2, b.gate_up, b.down) for b in blocks],
        model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight,
        cos[0].contiguous(), sin[0].contiguous(), config.num_key_value_heads, config.rms_norm_eps,
    )  # fmt: skip


class NativeDecoder:
    """`Decoder` in one call of compiled code a step."""

    def __init__(self, cache: KVCache, real_NS: Tensor, forward: native.Forward):
        self.cache, self.forward = cache, forward
        self.first_N = cache.length - real_NS.sum(1)
        self.rows_N = torch.arange(len(real_NS))

    def step(self, tokens_N: Tensor) -> Tensor:
        cache, rows_N = self.cache, self.rows_N
        if cache.length >= cache.max_length:
            raise ValueError(f"KV cache holds {cache.max_length} tokens, {cache.length + 1} needed")
        column_N = torch.full_like(rows_N, cache.length)
        cache.length += 1
        return self.forward(
            tokens_N, rows_N, column_N, self.first_N, rows_N, cache.keys, cache.values
        )

    def keep(self, rows: Tensor) -> None:
        self.cache.reorder(rows)
        self.first_N, self.rows_N = self.first_N[rows], torch.arange(len(rows))


class _Weights:
    """A block's parameters, those that multiply the same vector in one matrix."""

    def __init__(self, block: nn.Module):
        attention = block.self_attn
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        self.eps = block.input_layernorm.eps
        self.norm_1, self.norm_2 = (
            block.input_layernorm.weight, block.post_attention_layernorm.weight
        )  # fmt: skip
        self.qkv = stacked([part.weight for part in projections])
        self.qkv_bias = stacked([part.bias for part in projections])
        self.out = attention.o_proj.weight
        self.moe = None
        if isinstance(block.mlp, MLP):
            self.gate_up = stacked([block.mlp.gate_proj.weight, block.mlp.up_proj.weight])
            self.down = block.mlp.down_proj.weight
        else:
            self.moe = block.mlp


@torch.no_grad()
def stacked(parameters: list[nn.Parameter]) -> Tensor:
    """The parameters one below the other, as one tensor that shares their memory.

    The first call moves them next to each other; they stay separate parameters and need no memory
    twice, and what an optimiser does to them shows in the tensor.
    """
    first = parameters[0]
    storage, place = first.untyped_storage().data_ptr(), first.storage_offset()
    rows = sum(parameter.shape[0] for parameter in parameters)
    for parameter in parameters:
        here = parameter.untyped_storage().data_ptr(), parameter.storage_offset()
        if here != (storage, place) or not parameter.is_contiguous():
            break
        place += parameter.numel()
    else:
        shape = (rows, *first.shape[1:])
        return first.detach().as_strided(shape, first.stride(), first.storage_offset())
    with torch.inference_mode(False):
        whole = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, part in zip(parameters, whole.split([len(p) for p in parameters])):
            parameter.data = part
    return whole
