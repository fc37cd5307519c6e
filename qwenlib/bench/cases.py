"""What is timed: each case builds the two sides, and a rule for when their outputs are the same.

Shapes: B rows, T time, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from qwenlib import kernels
from qwenlib.bench.models import transformers_twin, weight_bytes
from qwenlib.generation import generate
from qwenlib.generation.decoder import begin
from qwenlib.model import Qwen, QwenConfig


class SkipCase(RuntimeError):
    """This case cannot run here; the message says what it needs."""


@dataclass(frozen=True)
class Task:
    """Two ways to the same output.

    peers: label -> call; the runner keeps the fastest. amount: produced or read by one call, and
    unit, its rate's. difference: (ours, theirs) -> "" or what differs. step_bytes, steps: bytes of
    weights that one decoding step reads, and steps of a call, where the share of memory bandwidth
    means something. library: whose the peers are. prepare: called before each call, outside of its
    time. peak_mb: the peak memory of a side in MB, by the peer's label, None for ours.
    """

    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any]]
    amount: float
    difference: Callable[[Any, Any], str]
    step_bytes: int = 0
    steps: int = 0
    unit: str = "tokens/s"
    library: str = "transformers"
    prepare: Callable[[], object] = lambda: None
    peak_mb: Callable[[str | None], float] | None = None


@dataclass(frozen=True)
class Case:
    """A named task; `sizes` are the keyword arguments of `make(device, dtype, **sizes)`.

    most_rounds: for a case of which one round takes long.
    """

    name: str
    kind: str  # one of runner.KINDS
    about: str
    make: Callable[..., Task]
    sizes: dict[str, Any] = field(default_factory=dict)
    most_rounds: int | None = None

    def resized(self, **sizes: Any) -> "Case":
        return replace(self, sizes={**self.sizes, **sizes})


def _prompts(vocab_size: int, rows: int, shortest: int, longest: int) -> list[list[int]]:
    """Random prompts whose lengths run from shortest to longest."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(shortest, longest, rows).round().long()
    lengths = lengths[torch.randperm(rows, generator=generator)]
    # Id 0 pads.
    return [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def _left_padded(prompts: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


def decode(
    device, dtype, *, model: Callable[..., Qwen], rows: int, prompt_tokens: tuple[int, int],
    new_tokens: int, sampling: dict[str, Any] | None = None, samples: int = 1,
    bandwidth: bool = False,
) -> Task:  # fmt: skip
    """Prompts in, all new tokens out; greedy unless `sampling` is given. No stop ids."""
    net = model(device=device, dtype=dtype)
    prompts = _prompts(net.config.vocab_size, rows, *prompt_tokens)
    generate(net, prompts[:1], 2)  # may lay the weights out anew; the twin then shares them
    twin, inputs = transformers_twin(net), _left_padded(prompts, device)
    width = inputs["input_ids"].shape[1]
    options = {"do_sample": sampling is not None, **(sampling or {})}
    if samples > 1:
        options["num_return_sequences"] = samples

    def ours() -> list[list[int]]:
        return generate(
            net, prompts, new_tokens, samples=samples, batch_size=rows * samples, **(sampling or {})
        ).completions

    def theirs(cache: str) -> Callable[[], list[list[int]]]:
        def call() -> list[list[int]]:
            with torch.inference_mode():
                out_BT = twin.generate(
                    **inputs, max_new_tokens=new_tokens, cache_implementation=cache, **options
                )
            return out_BT[:, width:].tolist()

        return call

    if sampling is not None:
        difference = lengths_differ
    elif dtype == torch.float32:
        difference = tokens_differ
    else:
        # Rounding decides between near-equal tokens; the logits must still agree.
        difference = lengths_differ
        refuse(_prompt_logits_differ(net, twin, inputs))
    return Task(
        ours=ours,
        peers={"dynamic cache": theirs("dynamic"), "static cache": theirs("static")},
        amount=rows * samples * new_tokens,
        difference=difference,
        step_bytes=weight_bytes(net) if bandwidth else 0,
        steps=new_tokens,
    )


def prefill(device, dtype, *, model: Callable[..., Qwen], rows: int, tokens: int) -> Task:
    """Read whole prompts into a KV cache, as `generate` does; logits of the last position."""
    net = model(device=device, dtype=dtype)
    ids_BT = _ids(net.config, rows, tokens, device)
    real_BT = torch.ones_like(ids_BT)

    @torch.inference_mode()
    def ours() -> torch.Tensor:
        return begin(net, ids_BT, real_BT, samples=1, max_new_tokens=1)[1]

    ours()  # may lay the weights out anew; the twin then shares them
    twin = transformers_twin(net)

    @torch.inference_mode()
    def theirs() -> torch.Tensor:
        return twin(ids_BT, use_cache=True, logits_to_keep=1).logits[:, -1]

    return Task(ours, {"dynamic cache": theirs}, rows * tokens, logits_differ)


def forward(device, dtype, *, model: Callable[..., Qwen], rows: int, tokens: int) -> Task:
    """Logits of every position, without gradients."""
    net = model(device=device, dtype=dtype)
    twin, ids_BT = transformers_twin(net), _ids(net.config, rows, tokens, device)

    @torch.inference_mode()
    def ours() -> torch.Tensor:
        return net(ids_BT)

    @torch.inference_mode()
    def theirs() -> torch.Tensor:
        return twin(ids_BT, use_cache=False).logits

    return Task(ours, _by_experts(twin, theirs), rows * tokens, logits_differ)


def train(device, dtype, *, model: Callable[..., Qwen], rows: int, tokens: int) -> Task:
    """The mean cross-entropy, forward and backward; the loss and every gradient.

    Ours is `kernels.linear_cross_entropy`, as in training; transformers' takes whole logits.
    """
    net = model(device=device, dtype=dtype).train()
    twin, ids_BT = transformers_twin(net), _ids(net.config, rows, tokens + 1, device)
    inputs_BT, labels_M = ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].flatten()

    def step(module, loss_of) -> dict[str, torch.Tensor]:
        module.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in module.named_parameters()}}

    def our_loss() -> torch.Tensor:
        x_MD = net.hidden(inputs_BT).flatten(0, 1)
        loss_sum, _ = kernels.linear_cross_entropy(x_MD, net.lm_head.weight, labels_M)
        return loss_sum / len(labels_M)

    def their_loss() -> torch.Tensor:
        logits_BTV = twin(inputs_BT, use_cache=False).logits
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_M)

    def ours() -> dict[str, torch.Tensor]:
        return step(net, our_loss)

    def theirs() -> dict[str, torch.Tensor]:
        return step(twin, their_loss)

    return Task(ours, _by_experts(twin, theirs), rows * tokens, gradients_differ)


def _by_experts(twin, call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """Each way in which transformers computes experts; a dense model has only one."""
    if "moe" not in twin.config.model_type:
        return {"sdpa": call}

    def with_experts(name: str) -> Callable[[], Any]:
        def run() -> Any:
            twin.set_experts_implementation(name)
            return call()

        return run

    return {f"{name} experts": with_experts(name) for name in ("eager", "grouped_mm")}


def _ids(config: QwenConfig, rows: int, tokens: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (rows, tokens), generator=generator).to(device)


class DifferentOutput(RuntimeError):
    """The two sides do not compute the same thing, so their times mean nothing."""


def refuse(difference: str) -> None:
    if difference:
        raise DifferentOutput(difference)


def tokens_differ(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """Token by token."""
    for row, (a, b) in enumerate(zip(ours, theirs)):
        for place, (x, y) in enumerate(zip(a, b)):
            if x != y:
                return f"row {row} differs at new token {place}: {x} here, {y} there"
    return lengths_differ(ours, theirs)


def lengths_differ(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """Rows and tokens a row."""
    a, b = [len(row) for row in ours], [len(row) for row in theirs]
    return "" if a == b else f"lengths of the rows differ: {a} here, {b} there"


def logits_differ(ours: torch.Tensor, theirs: torch.Tensor, name: str = "logits") -> str:
    """Largest difference over their root mean square: 1e-3 in fp32, 0.1 in half precision.

    A lost bias or a wrong rotation shows at 0.1 and more in fp32, rounding at 1e-5.
    """
    if ours.shape != theirs.shape:
        return f"{name} have shape {tuple(ours.shape)} here, {tuple(theirs.shape)} there"
    limit = 1e-3 if ours.dtype == torch.float32 else 0.1
    scale = theirs.float().square().mean().sqrt().clamp(min=1e-20)
    worst = float((ours.float() - theirs.float()).abs().max() / scale)
    return "" if worst <= limit else f"{name} differ by {worst:.1e} of their size"


def gradients_differ(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str:
    """The loss and every gradient, by name."""
    if set(ours) != set(theirs):
        return f"only one side has {sorted(set(ours) ^ set(theirs))}"
    for name, value in ours.items():
        if value is None or theirs[name] is None:
            return f"{name} has no gradient on one side"
        if difference := logits_differ(value, theirs[name], name):
            return difference
    return ""


@torch.inference_mode()
def _prompt_logits_differ(net: Qwen, twin: Any, inputs: dict[str, torch.Tensor]) -> str:
    ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
    ours_BV = net(ids_BT, attention_mask_BS=mask_BT)[:, -1]
    return logits_differ(ours_BV, twin(**inputs, use_cache=False).logits[:, -1])
