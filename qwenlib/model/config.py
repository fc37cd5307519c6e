"""The configuration of a Qwen2.5 model, dense or MoE, with the field names of its `config.json`."""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any

# Keys of a released config.json that do not change what the network computes. The window's two
# keys count only with use_sliding_window, which is refused.
_INERT_KEYS = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "max_window_layers",
    "model_type", "output_router_logits", "pad_token_id", "sliding_window", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
# Keys with one value that this network computes; any other value is refused by name.
_FIXED_KEYS = {
    "attention_dropout": 0.0, "hidden_act": "silu", "qkv_bias": True, "use_mrope": False,
    "use_sliding_window": False,
}  # fmt: skip
_ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}
_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071): scale `factor` over the trained length.

    attention_factor None means 0.1 ln(factor) + 1, multiplied into cos and sin.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"YaRN factor must be at least 1, got {self.factor}")
        if self.original_max_position_embeddings <= 0:
            raise ValueError("YaRN original_max_position_embeddings must be positive")

    @property
    def resolved_attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class MoEConfig:
    """Routed experts beside a shared one (report §2; Qwen2 report §2.2.2).

    A layer is dense when it is in mlp_only_layers or (layer + 1) % decoder_sparse_step is not 0.
    norm_topk_prob: renormalise the chosen gates to sum to one; the releases do not.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.001

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_only_layers", tuple(self.mlp_only_layers))
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is not between 1 and num_experts "
                f"{self.num_experts}"
            )
        for name in (
            "moe_intermediate_size", "shared_expert_intermediate_size", "decoder_sparse_step"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class QwenConfig:
    """Shape of a model. Field names are Hugging Face's; lengths are in tokens.

    With `moe` set the model is a mixture of experts and intermediate_size belongs to its dense
    layers, if it has any.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    head_dim: int | None = None
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    yarn: YarnConfig | None = None
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; give head_dim or change one of them"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.head_dim}")

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer 0 … num_hidden_layers - 1 routes its tokens to experts."""
        moe = self.moe
        return (
            moe is not None
            and layer not in moe.mlp_only_layers
            and (layer + 1) % moe.decoder_sparse_step == 0
        )

    def replace(self, **changes: Any) -> "QwenConfig":
        """A copy with some fields changed; an unknown field raises with the nearest name."""
        known = {field.name for field in dataclasses.fields(self)}
        for key in changes:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"QwenConfig has no field {key!r}{hint}")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "QwenConfig":
        """Read the dict of a `config.json`; a key that would change the network is an error.

        Raises ValueError for another architecture, sliding windows, an unsupported activation or
        RoPE type, or an unknown key.
        """
        kind = config.get("model_type", "qwen2")
        if kind not in _ARCHITECTURES:
            raise ValueError(
                f"model_type {kind!r} is none of {', '.join(_ARCHITECTURES)}: another architecture"
            )
        moe_fields = {field.name for field in dataclasses.fields(MoEConfig)}
        fields = {field.name for field in dataclasses.fields(cls)} - {"yarn", "moe"}
        known = fields | _INERT_KEYS | _ROPE_KEYS | set(_FIXED_KEYS) | {"layer_types"}
        if kind == "qwen2_moe":
            known |= moe_fields
        for key, value in _FIXED_KEYS.items():
            if config.get(key) not in (None, value):
                raise ValueError(f"{key} is {config[key]!r}: only {value!r} is supported")
        if windows := set(config.get("layer_types") or ()) - {"full_attention"}:
            raise ValueError(f"layer_types names {sorted(windows)}: only 'full_attention' is known")
        unknown = sorted(
            key for key in set(config) - known if config[key] not in (None, False, [], {})
        )
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f" (nearest known: {near[0]})" if near else ""
            raise ValueError(f"config.json has unknown keys {unknown}{hint}")
        theta, yarn = _read_rope(config)
        values = {key: config[key] for key in fields if config.get(key) is not None}
        _require(cls, values)
        moe = None
        if kind == "qwen2_moe":
            moe_values = {key: config[key] for key in moe_fields if config.get(key) is not None}
            _require(MoEConfig, moe_values)
            moe = MoEConfig(**moe_values)
        return cls(**{**values, "rope_theta": theta, "yarn": yarn, "moe": moe})

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers (4 and 5) and vLLM open."""
        yarn = None
        if self.yarn is not None:
            yarn = {key: v for key, v in dataclasses.asdict(self.yarn).items() if v is not None}
            yarn = {"rope_type": "yarn", "type": "yarn", **yarn}
        out = dataclasses.asdict(self)
        del out["yarn"], out["moe"]
        kind = "qwen2" if self.moe is None else "qwen2_moe"
        if self.moe is not None:
            out |= dataclasses.asdict(self.moe)
            out["mlp_only_layers"] = list(self.moe.mlp_only_layers)
        return {
            "architectures": [_ARCHITECTURES[kind]],
            "model_type": kind,
            **out,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "rope_scaling": yarn,
            "use_sliding_window": False,
            "use_cache": True,
        }


def _require(cls: type, values: dict[str, Any]) -> None:
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")


def _read_rope(config: dict[str, Any]) -> tuple[float, YarnConfig | None]:
    """RoPE base and YaRN entry from either spelling; transformers 5 writes rope_parameters."""
    entry = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    parameters = config.get("rope_parameters") or {}
    theta = config.get("rope_theta") or parameters.get("rope_theta") or 10_000.0
    entry.pop("rope_theta", None)
    kinds = {entry.pop(key) for key in ("type", "rope_type") if entry.get(key)}
    if len(kinds) > 1:
        raise ValueError(f"rope_scaling names two types: {sorted(kinds)}")
    kind = kinds.pop() if kinds else "default"
    if kind == "default":
        if entry:
            raise ValueError(f"rope_scaling of type 'default' leaves {sorted(entry)} unused")
        return float(theta), None
    if kind != "yarn":
        raise ValueError(f"RoPE type {kind!r} is not supported; use 'default' or 'yarn'")
    entry.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    known = {field.name for field in dataclasses.fields(YarnConfig)}
    if set(entry) - known:
        raise ValueError(f"rope_scaling has keys that nothing reads: {sorted(set(entry) - known)}")
    return float(theta), YarnConfig(**entry)
