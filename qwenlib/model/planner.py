"""What it takes to train or to serve a configuration: memory by kind, FLOPs, time and money.

    plan("7b", tokens=1e9, gpus=64).days
    plan("report-72b").cost
    plan("14b", "serve", prompt_length=32_768).largest_batch

Nothing runs here: numbers follow from the configuration, a GPU's data sheet and stated settings.
Sizes are bytes on one GPU (1 GB = 1e9), times seconds, prices US dollars.
"""

import bisect
import dataclasses
import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlib.model import accounting, memory, presets
from qwenlib.model.accounting import ParameterCount, flops_per_token, kv_bytes_per_token
from qwenlib.model.config import QwenConfig
from qwenlib.model.gpus import GPUS, Gpu
from qwenlib.model.memory import RECIPES, MemoryBreakdown

SHARDINGS = ("none", "zero1", "fsdp")
# Llama 3 405B reached 38 to 43 % of the H100's bf16 peak (arXiv 2407.21783, table 4).
UTILISATION = 0.4
# Share of an A100's bandwidth that vLLM 0.6.3 used at batch 1: 55 to 70 % for 7B to 72B (the
# release's speed page, whose tokens/s a test compares).
BANDWIDTH_UTILISATION = 0.6


@dataclass(frozen=True)
class Training:
    """One training job. Batches are sequences: micro_batch on each GPU (or tensor-parallel group).

    tokens None: 20 a parameter (arXiv 2203.15556). global_batch None: one micro-batch on each
    replica. tensor_parallel divides states and activations alike, as with sequence parallelism
    (arXiv 2205.05198, §4.2.2). utilisation: executed FLOPs over the GPU's peak. loss_chunk: tokens,
    0 for the whole micro-batch. assumed: (setting, why) of those that nobody published.
    """

    config: QwenConfig
    model: str = "custom"
    tokens: float | None = None
    sequence_length: int = 4096
    micro_batch: int = 1
    global_batch: int | None = None
    gpu: Gpu = GPUS["h100-sxm"]
    gpus: int = 8
    recipe: str = "mixed"
    sharding: str = "fsdp"
    tensor_parallel: int = 1
    checkpointing: str = "none"
    kernels: str = "fused"
    loss_chunk: int = 0
    utilisation: float = UTILISATION
    price: float = 2.0
    assumed: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _choose("recipe", self.recipe, RECIPES)
        _choose("sharding", self.sharding, SHARDINGS)
        _check(self, "sequence_length", "micro_batch", "gpus")
        _splits(self.config, self.tensor_parallel, self.gpus)
        if self.tokens is None:
            object.__setattr__(self, "tokens", 20.0 * accounting.parameter_count(self.config).total)
        at_once = self.micro_batch * self.replicas
        if self.global_batch is None:
            object.__setattr__(self, "global_batch", at_once)
        _check(self, "tokens", "global_batch")
        if self.global_batch % at_once:
            raise ValueError(
                f"global_batch {self.global_batch} is no multiple of {at_once}: micro_batch "
                f"{self.micro_batch} on each of {self.replicas} replicas"
            )

    @property
    def replicas(self) -> int:
        """Data-parallel degree."""
        return self.gpus // self.tensor_parallel


@dataclass(frozen=True)
class Plan:
    """Costs of a `Training`. FLOPs are a token's matrix products; executed: with recomputation."""

    settings: Training
    parameters: ParameterCount
    memory: MemoryBreakdown
    forward_flops: float
    model_flops: float
    executed_flops: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.settings.gpu.memory

    @property
    def steps(self) -> int:
        s = self.settings
        return math.ceil(s.tokens / (s.global_batch * s.sequence_length))

    @property
    def mfu(self) -> float:
        """Model FLOPs over peak (arXiv 2204.02311, appendix B): recomputation earns nothing."""
        return self.settings.utilisation * self.model_flops / self.executed_flops

    @property
    def tokens_per_second_per_gpu(self) -> float:
        s = self.settings
        return s.gpu.flops * RECIPES[s.recipe].speed * s.utilisation / self.executed_flops

    @property
    def gpu_hours(self) -> float:
        return self.settings.tokens / self.tokens_per_second_per_gpu / 3600

    @property
    def days(self) -> float:
        return self.gpu_hours / self.settings.gpus / 24

    @property
    def cost(self) -> float:
        return self.gpu_hours * self.settings.price

    def as_json(self) -> dict[str, Any]:
        """Settings, parameters, bytes, FLOPs, time and money, for one line of JSON."""
        flops, tokens = self.model_flops * self.settings.tokens, self.settings.tokens
        return _json(self) | {
            "flops_per_token": {"forward": self.forward_flops, "model": self.model_flops,
                                "executed": self.executed_flops},
            "flops": flops, "flops_over_6nd": flops / (6 * self.parameters.activated * tokens),
            "steps": self.steps, "mfu": self.mfu, "days": self.days, "gpu_hours": self.gpu_hours,
            "gpu_days": self.gpu_hours / 24, "cost": self.cost,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
        }  # fmt: skip


def plan_training(settings: Training) -> Plan:
    """Memory, FLOPs and time of a training job.

    States are divided as in ZeRO (arXiv 1910.02054, §5): "zero1" shares masters and moments among
    the replicas, "fsdp" (stage 3) weights and gradients too, and holds whole, for a moment, two
    blocks (one in use, one on its way), one block's gradients, and the tables outside with theirs.
    Communication, waiting for data and failures are left to the utilisation.
    """
    s, config, recipe = settings, settings.config, RECIPES[settings.recipe]
    count = accounting.parameter_count(config)
    N, D, V, e = count.total, config.hidden_size, config.vocab_size, recipe.activations
    optimiser_ranks = 1 if s.sharding == "none" else s.replicas
    weight_ranks = s.replicas if s.sharding == "fsdp" else 1
    tables = count.embedding + count.head + D
    block = (N - tables) / config.num_hidden_layers
    gathered = recipe.weights * (2 * block + tables) + recipe.gradients * (block + tables)
    tokens = s.micro_batch * s.sequence_length
    kept, working = memory.activation_bytes(config, tokens, e, s.kernels, s.checkpointing)
    kinds = {
        "weights": N * recipe.weights / weight_ranks,
        "gradients": N * recipe.gradients / weight_ranks,
        "masters": N * recipe.masters / optimiser_ranks,
        "moments": N * recipe.moments / optimiser_ranks,
        "gathered": gathered if weight_ranks > 1 else 0, "activations": kept, "working": working,
        "logits": memory.loss_bytes(config, tokens, s.loss_chunk, e),
    }  # fmt: skip
    kinds = {kind: size / s.tensor_parallel for kind, size in kinds.items()}
    forward = flops_per_token(config, s.sequence_length)
    model = executed = flops_per_token(config, s.sequence_length, training=True)
    if s.checkpointing == "full":
        # Blocks run forward twice; not the head, nor a dense block's last product (torch's
        # checkpoint stops where nothing more is needed).
        dense = sum(not config.is_moe_layer(i) for i in range(config.num_hidden_layers))
        executed += forward - 2 * D * (V + dense * config.intermediate_size)
    return Plan(s, count, MemoryBreakdown(**kinds), forward, model, executed)


@dataclass(frozen=True)
class Serving:
    """One replica on `gpus` GPUs in tensor parallel, bf16, `batch` conversations at a time.

    prefill_chunk: most prompt tokens that go through a block together.
    """

    config: QwenConfig
    model: str = "custom"
    prompt_length: int = 1024
    new_tokens: int = 256
    batch: int = 1
    prefill_chunk: int = 8192
    gpu: Gpu = GPUS["h100-sxm"]
    gpus: int = 1
    utilisation: float = UTILISATION
    bandwidth_utilisation: float = BANDWIDTH_UTILISATION
    price: float = 2.0

    def __post_init__(self) -> None:
        _check(self, "prompt_length", "new_tokens", "batch", "prefill_chunk", "gpus")
        _splits(self.config, self.gpus, self.gpus)


@dataclass(frozen=True)
class ServingPlan:
    """Costs of a `Serving`. decode_step_seconds is a mean: half of the new tokens are written."""

    settings: Serving
    parameters: ParameterCount
    memory: MemoryBreakdown
    largest_batch: int
    prefill_seconds: float
    decode_step_seconds: float
    decode_bound: str

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.settings.gpu.memory

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the whole batch."""
        return self.settings.batch / self.decode_step_seconds

    @property
    def cost_per_million_tokens(self) -> float:
        """Dollars for a million new tokens, their share of the prefill included."""
        s = self.settings
        seconds = self.prefill_seconds + s.new_tokens * self.decode_step_seconds
        return s.price * s.gpus * seconds / 3600 / (s.batch * s.new_tokens) * 1e6

    def as_json(self) -> dict[str, Any]:
        """Settings, parameters, bytes, time and money, for one line of JSON."""
        names = ("largest_batch", "prefill_seconds", "decode_step_seconds", "decode_bound",
                 "decode_tokens_per_second", "cost_per_million_tokens")  # fmt: skip
        return _json(self) | {name: getattr(self, name) for name in names}


def weights_read(config: QwenConfig, batch: int) -> float:
    """Parameters that one decode step of `batch` rows reads.

    An embedding table with a head of its own is looked up, not read. Of E experts, rows that choose
    C each, evenly and independently, visit E (1 - (1 - C/E)^batch).
    """
    count = accounting.parameter_count(config)
    read = count.total - (0 if config.tie_word_embeddings else count.embedding)
    if config.moe is not None:
        share = config.moe.num_experts_per_tok / config.moe.num_experts
        read -= count.idle * (1 - share) ** (batch - 1)
    return read


def serving_memory(settings: Serving, batch: int) -> MemoryBreakdown:
    """Memory of a replica: bf16 weights, each row's cache at full length, and the widest moment.

    That is a chunk of prompts in an FFN (stream, normed stream, gate, up, product) or bf16 and fp32
    logits of one position a row.
    """
    s, config = settings, settings.config
    ffn = ("gate, up", "product", "visits", "expert gate, up", "expert product")
    blocks = (memory.stored_tensors(config, layer) for layer in range(config.num_hidden_layers))
    widest = max(sum(block.get(name, 0) for name in ffn) for block in blocks)
    return MemoryBreakdown(
        weights=2 * accounting.parameter_count(config).total / s.gpus,
        working=min(s.prefill_chunk, batch * s.prompt_length)
        * (4 * config.hidden_size + widest) / s.gpus,
        logits=6 * config.vocab_size * batch / s.gpus,
        kv_cache=batch * (s.prompt_length + s.new_tokens) * kv_bytes_per_token(config) / s.gpus,
    )  # fmt: skip


def plan_serving(settings: Serving) -> ServingPlan:
    """Memory, largest batch, prefill and decode time of one replica.

    Prefill is bound by arithmetic, with one head product a prompt. A decode step takes the longer
    of its bytes (weights and the batch's cache) over the bandwidth and its FLOPs over the speed.
    """
    s, config = settings, settings.config
    largest = bisect.bisect_right(
        range(1, 2**30), s.gpu.memory, key=lambda batch: serving_memory(s, batch).total
    )
    speed = s.gpu.flops * s.utilisation * s.gpus
    bandwidth = s.gpu.bandwidth * s.bandwidth_utilisation * s.gpus
    head = 2 * config.vocab_size * config.hidden_size
    prompt = s.prompt_length * (flops_per_token(config, s.prompt_length) - head) + head
    keys = s.prompt_length + (s.new_tokens + 1) / 2
    read = 2 * weights_read(config, s.batch) + s.batch * keys * kv_bytes_per_token(config)
    step = {
        "bandwidth": read / bandwidth,
        # flops_per_token takes the context whose mean is that many keys
        "arithmetic": s.batch * flops_per_token(config, 2 * keys - 1) / speed,
    }
    bound = max(step, key=step.get)
    return ServingPlan(
        s, accounting.parameter_count(config), serving_memory(s, s.batch), largest,
        s.batch * prompt / speed, step[bound], bound,
    )  # fmt: skip


def report_training(name: str) -> Training:
    """The report's pretraining of one of the seven sizes; `assumed` says what is our guess.

    Published: 18T tokens; rows of 4,096 tokens, and of 32,768 in a last phase of unknown length.
    """
    config = presets.PRESETS[name.removeprefix("report-")]
    longer = flops_per_token(config, 32_768) / flops_per_token(config, 4096)
    assumed = dict.fromkeys(_fields(Training), "not published") | {
        "tokens": "published as 'up to 18 trillion'; that every size saw all is assumed",
        "sequence_length": "published, but for a last phase at 32,768 of unknown length; "
        f"there a token takes {longer:.2f} times the FLOPs",
        "global_batch": "not published; as many tokens as Llama 3 405B's (arXiv 2407.21783)",
        "utilisation": "not published; what Llama 3 405B reached",
        "price": "a round number",
    }
    return Training(
        config, name, tokens=18e12, global_batch=4096, gpus=1024, checkpointing="selective",
        tensor_parallel=2 if name == "report-72b" else 1, loss_chunk=1024,
        assumed=tuple(sorted(assumed.items())),
    )  # fmt: skip


REPORT = tuple(f"report-{name}" for name in presets.PRESETS)


def plan(model: str | Path | QwenConfig, mode: str = "train", **settings) -> Plan | ServingPlan:
    """Plan for a preset ("7b", "report-7b"), a model folder or a configuration.

    mode "train" takes the fields of `Training` and returns a `Plan`, "serve" those of `Serving`
    and returns a `ServingPlan`; gpu may be a name of `GPUS`. Raises ValueError naming the nearest
    model, GPU, setting or choice for an unknown one.
    """
    _choose("mode", mode, ("train", "serve"))
    kind, run = (Training, plan_training) if mode == "train" else (Serving, plan_serving)
    for name in settings:
        _choose(f"setting of mode {mode!r}", name, _fields(kind))
    if isinstance(settings.get("gpu"), str):
        settings["gpu"] = GPUS[_choose("GPU", settings["gpu"].lower(), GPUS)]
    name = "custom" if isinstance(model, QwenConfig) else str(model)
    if name.lower() not in REPORT or mode == "serve":
        return run(kind(_configuration(model), name, **settings))
    base = report_training(name.lower())
    assumed = tuple(row for row in base.assumed if row[0] not in settings)
    return run(dataclasses.replace(base, assumed=assumed, **settings))


def _fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)} - {"config", "model", "assumed"}


def _configuration(model: str | Path | QwenConfig) -> QwenConfig:
    if isinstance(model, QwenConfig):
        return model
    if (file := Path(model) / "config.json").is_file():
        try:
            return QwenConfig.from_hf(json.loads(file.read_text(encoding="utf-8")))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error
    if Path(model).is_dir():
        raise ValueError(f"{model} is no model folder: it has no config.json")
    name = _choose("model", str(model).lower(), [*presets.names(), *REPORT])
    return presets.find(name.removeprefix("report-"))


def _json(plan: Plan | ServingPlan) -> dict[str, Any]:
    s, count = plan.settings, plan.parameters
    settings = {field.name: getattr(s, field.name) for field in dataclasses.fields(s)[1:]}
    settings |= {"gpu": s.gpu.name, "assumed": dict(getattr(s, "assumed", ()))}
    kinds = ("total", "non_embedding", "activated", "activated_non_embedding")
    return {
        "settings": settings, "parameters": {kind: getattr(count, kind) for kind in kinds},
        "memory_bytes": dataclasses.asdict(plan.memory) | {"total": plan.memory.total},
        "gpu_memory_bytes": s.gpu.memory, "fits": plan.fits,
    }  # fmt: skip


def _choose(what: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    near = [k for k in known if k.startswith(name)] or close
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    raise ValueError(f"unknown {what} {name!r}{hint} Known: {', '.join(sorted(known))}")


def _check(settings: Training | Serving, *positive: str) -> None:
    for name in positive:
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(settings, name)}")
    for name in ("utilisation", "bandwidth_utilisation"):
        if not 0 < getattr(settings, name, 1) <= 1:
            raise ValueError(f"{name} is a share of the peak, got {getattr(settings, name)}")
    for name in ("price", "loss_chunk"):
        if getattr(settings, name, 0) < 0:
            raise ValueError(f"{name} cannot be negative, got {getattr(settings, name)}")


def _splits(config: QwenConfig, degree: int, gpus: int) -> None:
    kv = config.num_key_value_heads
    if degree < 1 or gpus % degree or kv % degree:
        raise ValueError(f"tensor-parallel degree {degree} must divide {gpus} GPUs, {kv} kv heads")
