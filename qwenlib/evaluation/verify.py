"""Is this the released architecture? A parity battery against transformers, layer by layer.

Each case runs the same weights and ids through both libraries in fp32 on the CPU. Without a model
the shapes are all presets, scaled down, with *every* parameter redrawn: fresh biases of 0 and gains
of 1 would hide a network that ignores them.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwenlib.data.packing import pack_rows
from qwenlib.generation import generate
from qwenlib.model import Qwen, QwenConfig, load_pretrained, presets
from qwenlib.model.sources import resolve_model

LENGTH = 96
TOLERANCE, MOE_TOLERANCE = 1e-5, 2e-5
VOCABULARY = 97


@dataclass(frozen=True)
class Case:
    """One comparison of two tensors, the largest absolute difference of their entries.

    Tensors whose largest entry is below one (a tied head's logits, gradients) are divided by it
    first. layers: the same for what every block gives out, in order of execution (of gradients:
    for every parameter, from the last back), always divided; first: the first that is off, if any.
    """

    name: str
    difference: float
    tolerance: float
    layers: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN

    @property
    def first(self) -> str | None:
        if self.passed:
            return None
        off = (name for name, value in self.layers.items() if not value <= self.tolerance)
        return next(off, None)


def scaled_down(config: QwenConfig) -> QwenConfig:
    """The same network on a small scale: heads, groups, experts, eps, base and tying are kept."""
    head_dim = 8 if config.num_attention_heads <= 16 else 4
    hidden_size = head_dim * config.num_attention_heads
    moe = config.moe and dataclasses.replace(
        config.moe, moe_intermediate_size=12, shared_expert_intermediate_size=40
    )
    return config.replace(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        head_dim=head_dim,
        intermediate_size=8
        * round(config.intermediate_size / config.hidden_size * hidden_size / 8),
        num_hidden_layers=2,
        max_position_embeddings=2 * LENGTH,
        moe=moe,
    )


@torch.no_grad()
def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter anew: biases Normal(0, 0.5), gains Uniform(0.5, 1.5), matrices of unit gain.

    The embedding is as small as the root of eps, or the first norm would not show it.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            draw = torch.randn(parameter.shape, generator=generator)
            scale = 1e-3 if "embed_tokens" in name else 1 / math.sqrt(parameter.shape[-1])
            parameter.copy_(draw * scale)
        elif name.endswith("bias"):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model.eval()


def transformers_twin(model: Qwen, attention: str = "sdpa") -> nn.Module:
    """transformers' model on the tensors of ours, without a copy; its way of attention by name."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(**model.config.to_hf())
    # A tensor in the library's usual order is shared, one in another order is copied into it.
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    weight = weights["lm_head.weight"]
    with torch.device("meta"):
        twin = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=weight.dtype
        )
    twin.load_state_dict(weights, assign=True)
    twin.tie_weights()
    # Rotary frequencies are no weights: they were left on the meta device.
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config).to(weight.device)
    # End and padding ids are the caller's: no length may depend on what a model happens to say.
    twin.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return twin.requires_grad_(True).train(model.training)


def drawn_pair(config: QwenConfig, seed: int = 0) -> tuple[Qwen, nn.Module]:
    """A redrawn model and its twin, which attends step by step ("eager")."""
    model = redraw(Qwen(config), seed)
    return model, transformers_twin(model, "eager")


def battery(seed: int = 0) -> Iterator[Case]:
    """Every preset's shape: logits, both paddings, packing, both kinds of head, gradients."""
    shapes = presets.PRESETS | presets.MOE
    for name, preset in shapes.items():
        config = scaled_down(preset)
        yield from _shape_cases(name, config, seed)
        other = not config.tie_word_embeddings
        turned = config.replace(tie_word_embeddings=other)
        model, theirs = drawn_pair(turned, seed)
        label = f"{name}, {'tied' if other else 'untied'} head"
        yield _compare(label, model, theirs, _ids(2, seed), None, _tolerance(config))


def model_cases(source: str | Path, seed: int = 0, new_tokens: int = 16) -> Iterator[Case]:
    """A model folder (or whatever `resolve_model` knows) under both libraries, in fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = resolve_model(source)
    model = load_pretrained(folder, dtype=torch.float32).eval()
    # The same attention kernel in both: at logits of 30, as trained weights make them, two kernels
    # differ by 3e-4, which would hide a small mistake of ours.
    theirs = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    tolerance = 10 * _tolerance(model.config)
    ids_BT = _ids(2, seed, model.config.vocab_size)
    yield _compare("logits", model, theirs, ids_BT, None, tolerance)
    for side in ("left", "right"):
        mask_BT = _padding(ids_BT, side)
        yield _compare(f"{side} padding", model, theirs, ids_BT, mask_BT, tolerance)
    ids = ids_BT[0, :24].tolist()
    ours = generate(model, [ids], new_tokens).completions[0]
    rows = theirs.generate(
        torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None,
        attention_mask=torch.ones(1, 24, dtype=torch.long), pad_token_id=0,
    )  # fmt: skip
    other = sum(a != b for a, b in zip(ours, rows[0, 24:].tolist(), strict=True))
    yield Case(f"greedy tokens that differ, of {new_tokens}", float(other), 0.0)


def _shape_cases(name: str, config: QwenConfig, seed: int) -> Iterator[Case]:
    model, theirs = drawn_pair(config, seed)
    tolerance, ids_BT = _tolerance(config), _ids(3, seed)
    yield _compare(name, model, theirs, ids_BT, None, tolerance)
    for side in ("left", "right"):
        mask_BT = _padding(ids_BT, side)
        yield _compare(f"{name}, {side} padding", model, theirs, ids_BT, mask_BT, tolerance)
    yield _packed(f"{name}, packed", model, theirs, ids_BT, tolerance)
    yield _gradients(f"{name}, gradients", model, theirs, ids_BT, tolerance)


@torch.no_grad()
def _compare(name, model, theirs, ids_BT, mask_BT, tolerance) -> Case:
    """Logits of real tokens, and what every block gives out there."""
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    positions_BT = (real_BT.long().cumsum(-1) - 1).clamp(min=0)
    with _outputs(model) as ours_seen, _outputs(theirs) as their_seen:
        ours = model(ids_BT, attention_mask_BS=mask_BT)
        want = theirs(ids_BT, attention_mask=mask_BT, position_ids=positions_BT).logits
    layers = {
        block: _largest(ours_seen[block][real_BT], out[real_BT], relative=True)
        for block, out in their_seen.items()
    }
    layers["logits"] = _largest(ours[real_BT], want[real_BT], relative=True)
    return Case(name, _largest(ours[real_BT], want[real_BT]), tolerance, layers)


@torch.no_grad()
def _packed(name, model, theirs, ids_BT, tolerance) -> Case:
    """Documents in shared rows against each document alone in transformers."""
    flat, lengths = ids_BT.flatten().tolist(), (64, 30, 40, 1, 20, 55)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    documents = [flat[start : start + length] for start, length in zip(starts, lengths)]
    rows = pack_rows([(ids, None) for ids in documents], LENGTH, pad_id=0)
    ours = model(rows.input_ids_BT, rows.position_ids_BT, rows.document_ids_BT)
    difference = max(
        _largest(ours[rows.document_ids_BT == i], theirs(torch.tensor([ids])).logits[0])
        for i, ids in enumerate(documents)
    )
    return Case(name, difference, tolerance)


def _gradients(name, model, theirs, ids_BT, tolerance) -> Case:
    """Of the mean cross-entropy, for every parameter."""
    labels = ids_BT[:, 1:].flatten()
    for network, logits in ((model, model(ids_BT)), (theirs, theirs(ids_BT).logits)):
        network.zero_grad()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels).backward()
    wanted = dict(theirs.named_parameters())
    layers = {
        block: _largest(parameter.grad, wanted[block].grad, relative=True)
        for block, parameter in model.named_parameters()
    }
    worst = max(layers.values(), key=lambda value: (math.isnan(value), value))
    return Case(name, worst, tolerance, dict(reversed(layers.items())))


class _outputs:
    """Records, while entered, what the embedding, each block's two halves and the norm give out."""

    def __init__(self, network: nn.Module):
        decoder = network.model
        self.parts = {"embed_tokens": decoder.embed_tokens}
        for i, layer in enumerate(decoder.layers):
            self.parts[f"layers.{i}.self_attn"] = layer.self_attn
            self.parts[f"layers.{i}.mlp"] = layer.mlp
        self.parts["norm"] = decoder.norm

    def __enter__(self) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def keep(name):
            def hook(module, inputs, out):
                seen[name] = out[0] if isinstance(out, tuple) else out

            return hook

        self.hooks = [part.register_forward_hook(keep(name)) for name, part in self.parts.items()]
        return seen

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()


def _largest(got: Tensor, want: Tensor, relative: bool = False) -> float:
    scale = float(want.abs().max())
    if not relative:
        scale = min(scale, 1.0)
    return float((got - want).abs().max()) / (scale or 1.0)


def _ids(rows: int, seed: int, vocabulary: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(0, vocabulary, (rows, LENGTH), generator=generator)


def _padding(ids_BT: Tensor, side: str) -> Tensor:
    """Masks of rows of 96, 64 and 70 real tokens, padded on one side."""
    lengths = torch.tensor([LENGTH, 64, 70])[: len(ids_BT), None]
    columns_T = torch.arange(LENGTH)
    real_BT = columns_T < lengths if side == "right" else columns_T >= LENGTH - lengths
    return real_BT.long()


def _tolerance(config: QwenConfig) -> float:
    return TOLERANCE if config.moe is None else MOE_TOLERANCE
