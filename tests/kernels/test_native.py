"""The compiled forward pass against `Qwen.forward`, with every parameter redrawn."""

import ctypes
import os
import platform
import random
import shlex
import shutil
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from qwenlib import c_build as build
from qwenlib import kernels
from qwenlib.generation import decoder, generate
from qwenlib.generation.decoder import Decoder, NativeDecoder, begin, native_forward
from qwenlib.kernels import native
from qwenlib.model import KVCache, MoEConfig, Qwen, QwenConfig
from qwenlib.model.config import YarnConfig

V = 61
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(
    COMPILER is None or os.environ.get("QWENLIB_NATIVE") == "0", reason="needs a C compiler"
)
pytestmark = needs_compiler
# A panel has 12 rows and a register 16 numbers: sizes on both sides of their multiples.
VARIANTS = {
    "grouped heads": {},
    "one kv head": {"num_key_value_heads": 1},
    "a kv head each": {"num_key_value_heads": 4},
    "a single head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "yarn": {"yarn": YarnConfig(4.0, 24)},
    "smallest": {"vocab_size": 12, "hidden_size": 12, "intermediate_size": 12},
    "one more": {"vocab_size": 13, "hidden_size": 13, "intermediate_size": 13},
    "hidden 64": {"hidden_size": 64, "intermediate_size": 50},
    "hidden 100": {"hidden_size": 100, "intermediate_size": 119},
    **{f"heads of {size}": {"head_dim": size} for size in (32, 48, 64, 128)},
}


def model(**changes) -> Qwen:
    shape = QwenConfig(
        vocab_size=V, hidden_size=48, intermediate_size=70, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        rope_theta=100.0, rms_norm_eps=1e-2, tie_word_embeddings=True,
    ).replace(**changes)  # fmt: skip
    net, generator = Qwen(shape), torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        scale = 0.5 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        parameter.data = scale * draw + (1.0 if "norm" in name else 0.0)
    return net.eval()


def texts(lengths, vocabulary=V) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(vocabulary) for _ in range(length)] for length in lengths]


def padded(rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T), and which of them are real; padding on the left."""
    width = max(map(len, rows))
    ids_BT = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    real_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids_BT, real_BT


def native_logits(net, rows, room=0) -> list[torch.Tensor]:
    """The logits (T, V) of each row, all tokens of all rows in one call."""
    ids_BT, real_BT = padded(rows)
    row_M, column_M = real_BT.nonzero().unbind(1)
    room = max(room, ids_BT.shape[1])
    cache, forward = KVCache(net.config, len(rows), room), native_forward(net, room)
    assert forward is not None
    logits_MV = forward(
        ids_BT[row_M, column_M], row_M, column_M, ids_BT.shape[1] - real_BT.sum(1),
        torch.arange(len(row_M)), cache.keys, cache.values,
    )  # fmt: skip
    return list(logits_MV.split([len(row) for row in rows]))


def assert_equal_the_full_pass(net, rows, close=CLOSE, room=0) -> None:
    for row, got_TV in zip(rows, native_logits(net, rows, room), strict=True):
        with torch.no_grad():
            want_TV = net(torch.tensor([row]))[0]
        torch.testing.assert_close(got_TV, want_TV, **close)


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 32, 33, 48, 49, 70])
def test_any_number_of_tokens(tokens):
    """Blocks of 32, and a last one of which half or less is used."""
    assert_equal_the_full_pass(model(), texts([tokens]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_the_full_pass(variant):
    net = model(**VARIANTS[variant])
    assert_equal_the_full_pass(net, texts([1, 5, 37, 20], net.config.vocab_size), room=50)


@pytest.mark.parametrize("compiled_prompts", [True, False])
@pytest.mark.parametrize("variant", ["grouped heads", "yarn", "untied", "heads of 64"])
@torch.no_grad()
def test_prompts_and_steps_equal_the_full_pass(compiled_prompts, variant):
    """Unequal prompts with three samples each, rows that leave, room that is never used."""
    net, steps = model(**VARIANTS[variant]), 20
    prompts, samples = texts([9, 1, 40, 33]), 3
    new = torch.tensor(texts([steps] * 12))
    with pytest.MonkeyPatch.context() as patch:
        if not compiled_prompts:
            patch.setattr(decoder, "_NATIVE_PROMPT", 4)
        step_by_step, first_NV = begin(net, *padded(prompts), samples, steps + 7)
    assert isinstance(step_by_step, NativeDecoder)
    places, got = list(range(12)), [[logits_V] for logits_V in first_NV]
    for step in range(steps):
        if step == 8:
            keep = torch.tensor([10, 2, 7, 3])
            step_by_step.keep(keep)
            places = keep.tolist()
        for place, logits_V in zip(places, step_by_step.step(new[places, step]), strict=True):
            got[place].append(logits_V)
    for place, logits in enumerate(got):
        whole = prompts[place // samples] + new[place].tolist()
        want = net(torch.tensor([whole[: len(whole) - steps + len(logits) - 1]]))[0]
        torch.testing.assert_close(torch.stack(logits), want[-len(logits) :], **CLOSE)


def test_a_full_cache_is_refused():
    step_by_step, _ = begin(model(), *padded(texts([9])), 1, 3)
    assert step_by_step.cache.max_length == 12
    for _ in range(3):
        step_by_step.step(torch.tensor([1]))
    with pytest.raises(ValueError, match="holds 12 tokens, 13 needed"):
        step_by_step.step(torch.tensor([1]))


def test_more_than_a_thousand_keys():
    net = model(num_hidden_layers=1)
    assert_equal_the_full_pass(net, texts([1100, 3]), {"atol": 2e-5, "rtol": 1e-5}, room=1300)


def test_large_scores_and_gates():
    """Scores beyond +-80 and gates beyond +-100, against fp64."""
    net = model(num_hidden_layers=1)
    for name, factor in (("self_attn.q_proj", 50.0), ("mlp.gate_proj", 60.0)):
        layer = net.model.layers[0].get_submodule(name)
        for parameter in layer.parameters():
            parameter.data *= factor
    gates, scores, attention = [], [], kernels.attention

    def record(q_BTHK, k_BSGK, *others):
        k_BSHK = k_BSGK.repeat_interleave(2, dim=2)
        scores.append(torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK).tril() / 4)
        return attention(q_BTHK, k_BSGK, *others)

    (row,) = texts([60])
    (got_TV,) = native_logits(net, [row])
    net.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *io: gates.append(io[-1]))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(kernels, "attention", record)
        want_TV = net.double()(torch.tensor([row]))[0]
    for seen, size in ((gates, 100), (scores, 80)):
        assert seen[0].min() < -size and seen[0].max() > size, "the test's own numbers are large"
    torch.testing.assert_close(got_TV.double(), want_TV, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["self_attn.k_proj.bias", "self_attn.v_proj.bias",
                                  "mlp.gate_proj.weight", "mlp.down_proj.weight"])  # fmt: skip
def test_a_spoilt_parameter_shows(part, value):
    """As it does in PyTorch: no clamp of an exponent may hide it."""
    net = model()
    net.model.layers[0].get_parameter(part).data.flatten()[0] = value
    (row,) = texts([40])
    with torch.no_grad():
        want_TV = net(torch.tensor([row]))[0]
    assert want_TV.isnan().any(dim=1)[-1]
    (got_TV,) = native_logits(net, [row])
    assert torch.equal(got_TV.isnan().any(dim=1), want_TV.isnan().any(dim=1))


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_threads_change_no_bit(count):
    net, rows = model(), texts([1, 5, 37, 60])
    with threads(1):
        want = torch.cat(native_logits(net, rows))
    with threads(count):
        for _ in range(10):
            assert torch.equal(torch.cat(native_logits(net, rows)), want)


def test_other_rows_change_no_bit():
    """Whatever their number, their length, and the row's own place among them."""
    net, rows = model(), texts([37, 60, 1, 33, 9])
    for row, got_TV in zip(rows, native_logits(net, rows), strict=True):
        (alone_TV,) = native_logits(net, [row])
        assert torch.equal(got_TV, alone_TV)


def test_working_memory():
    """It is kept between calls, but not a much longer one's, and what lies in it never shows."""
    net, rows = model(), texts([20, 40, 10, 900])
    forward = native_forward(net, 900)

    def last(row):
        T, cache = len(row), KVCache(net.config, 1, 900)
        return forward(
            torch.tensor(row), torch.zeros(T, dtype=torch.long), torch.arange(T), torch.tensor([0]),
            torch.tensor([T - 1]), cache.keys, cache.values,
        )  # fmt: skip

    want = [last(row) for row in rows]
    largest = forward.room.numel()
    for row, want_1V in zip(rows, want):
        forward.room.fill_(float("nan"))
        assert torch.equal(last(row), want_1V)
        kept = forward.room
        last(row[:-1])
        assert forward.room is kept
    last(rows[0])
    assert forward.room.numel() < largest / 8


def test_tokens_may_lie_apart_and_must_exist():
    net, ids_BT = model(), torch.tensor(texts([30, 30]))
    step_by_step, _ = begin(net, ids_BT[:, :20], torch.ones(2, 20), 1, 11)
    got = torch.stack([step_by_step.step(ids_BT[:, t].int()) for t in range(20, 29)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(got, net(ids_BT)[:, 20:29], **CLOSE)
    for wrong in (-1, V):
        with pytest.raises(IndexError, match=f"outside 0 to {V - 1}"):
            step_by_step.step(torch.tensor([3, wrong]))


@pytest.mark.parametrize(
    "changes",
    [{"vocab_size": 11}, {"hidden_size": 11}, {"intermediate_size": 11}, {"head_dim": 24},
     {"moe": MoEConfig(6, 2, 20, 28)}],
    ids=str,
)  # fmt: skip
def test_what_it_cannot_run_goes_through_pytorch(changes):
    net = model(**changes)
    assert native_forward(net, 30) is None
    prompts = texts([5, 9], vocabulary=11)
    step_by_step, logits_NV = begin(net, *padded(prompts), 1, 3)
    assert type(step_by_step) is Decoder
    with torch.no_grad():
        for prompt, logits_V in zip(prompts, logits_NV, strict=True):
            torch.testing.assert_close(logits_V, net(torch.tensor([prompt]))[0, -1], **CLOSE)


def test_only_plain_fp32_parameters():
    def can_run(*tensors):
        return native.can_run(tensors, 64)

    good = torch.zeros(20, 24)
    assert can_run(good, torch.zeros(3))
    assert not can_run(good, good.double())
    assert not can_run(good, good.bfloat16())
    assert not can_run(good, good.to("meta"))
    assert not can_run(good, good.t())
    assert not can_run(good, good[:11])
    assert can_run(good, good[:12])


# --- compilers


def open_library(path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.qwen_forward.argtypes = native.library().qwen_forward.argtypes
    loaded.qwen_forward.restype = None
    return loaded


def processor_has(*features) -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and set(features) <= set(info.read_text().split())


@pytest.mark.parametrize(
    "flags", [("-mavx2", "-mfma", "-fopenmp"), ("-mavx",), ("-fopenmp",), ()],
    ids=lambda flags: " ".join(flags) or "plain",
)  # fmt: skip
def test_other_processors(flags, tmp_path, monkeypatch):
    """Registers of 16, 8 and 4 numbers, with and without threads."""
    if any("avx" in flag for flag in flags):
        if platform.machine() not in ("x86_64", "AMD64") or not processor_has("avx2", "fma"):
            pytest.skip("this processor has no AVX2")
    made = tmp_path / "native.so"
    command = [*shlex.split(COMPILER), *build._FLAGS, *flags, str(native._SOURCE), "-lm"]
    done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
    if done.returncode and flags:
        pytest.skip(f"this compiler does not know {flags}")
    assert done.returncode == 0, done.stderr
    loaded = open_library(made)
    monkeypatch.setattr(native, "library", lambda: loaded)
    for variant in ("grouped heads", "hidden 100", "smallest", "heads of 48", "heads of 128"):
        net = model(**VARIANTS[variant])
        with threads(2):
            assert_equal_the_full_pass(net, texts([1, 5, 37, 20], net.config.vocab_size))
    assert_equal_the_full_pass(model(), texts([12]))
    net, rows = model(), texts([37, 9])
    (alone_TV,) = native_logits(net, rows[1:])
    assert torch.equal(native_logits(net, rows)[1], alone_TV)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """native.library as in a new process with an empty cache; CC hands out the library made before.

    Each call of CC is a line of tmp_path/calls.
    """
    shutil.copy(build.library_file(native._SOURCE), tmp_path / "made.so")
    (tmp_path / "cc").write_text(
        f'echo >> {tmp_path}/calls\nwhile [ "$1" != -o ]; do shift; done\n'
        f'cp {tmp_path}/made.so "$2"\n'
    )
    monkeypatch.setenv("CC", f"sh {tmp_path}/cc")
    monkeypatch.setenv("QWENLIB_CACHE", str(tmp_path / "cache"))
    build.compiled.cache_clear()
    yield tmp_path / "cache" / "native"
    build.compiled.cache_clear()


@pytest.mark.parametrize(
    "compiler", [None, "/bin/false", "/bin/true", "/no/such/compiler", "QWENLIB_NATIVE=0"]
)
def test_without_a_compiler(compiler, fresh, monkeypatch):
    net, prompts = model(), texts([5, 20, 1])
    want = generate(net, prompts, 12).completions
    assert native.library() is not None
    build.compiled.cache_clear()
    shutil.rmtree(fresh)
    if compiler == "QWENLIB_NATIVE=0":
        monkeypatch.setenv("QWENLIB_NATIVE", "0")
    elif compiler is None:
        monkeypatch.delenv("CC")
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("CC", compiler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert generate(net, prompts, 12).completions == want
        assert generate(net, prompts, 12).completions == want
    assert native.library() is None
    assert list(fresh.glob("*")) == [], "nothing half-made is left"
    if compiler == "QWENLIB_NATIVE=0":
        assert caught == []
    else:
        (warning,) = caught
        assert "PyTorch" in str(warning.message)
        assert (compiler or "no C compiler found") in str(warning.message)


def test_compiled_once(fresh, monkeypatch, tmp_path):
    log = tmp_path / "calls"
    with ThreadPoolExecutor(8) as pool:  # as several processes on a new machine would
        paths = {
            future.result()
            for future in [pool.submit(build.library_file, native._SOURCE) for _ in range(8)]
        }
    assert list(fresh.iterdir()) == list(paths) and len(paths) == 1
    calls = log.read_text()
    assert build.library_file(native._SOURCE) in paths and native.library() is not None
    assert log.read_text() == calls
    changed = tmp_path / "native.c"
    changed.write_text(native._SOURCE.read_text() + "\n")
    monkeypatch.setattr(native, "_SOURCE", changed)
    build.library_file(native._SOURCE)
    assert log.read_text() == calls + "\n"


@pytest.mark.parametrize("left", [0, 700, 9000])
def test_a_damaged_library_is_made_again(left, fresh):
    made = build.library_file(native._SOURCE)
    whole = made.read_bytes()
    assert len(whole) > left
    made.write_bytes(whole[:left])
    assert native.library() is not None
    assert made.read_bytes() == whole


def test_a_cache_that_cannot_be_written(fresh):
    fresh.parent.write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="native.c does not run here"):
        assert native.library() is None


def test_a_library_that_does_not_load(fresh, tmp_path):
    (tmp_path / "made.so").write_text("for another machine")
    with pytest.warns(UserWarning, match="PyTorch's slower way"):
        assert native.library() is None
