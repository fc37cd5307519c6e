"""The head at full size, 4,096 tokens x 151,936 vocabulary x 896 hidden: its memory, its digits.

What counts is the peak above the inputs and their gradients, which every way needs: the largest
resident set of a fresh process during forward and backward pass, less the resident set before and
the bytes of the two gradients.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qwenlib.kernels import cross_entropy, linear_cross_entropy, linear_logprobs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc"),
]
TOKENS, V, D = 4096, 151_936, 896


def plain(x_MD, weight_VD, targets_M):
    return F.cross_entropy(F.linear(x_MD, weight_VD), targets_M, reduction="sum")


def ours(x_MD, weight_VD, targets_M):
    return linear_cross_entropy(x_MD, weight_VD, targets_M)[0]


def log_probabilities(x_MD, weight_VD, targets_M):
    """Each token with a weight of its own, and with its entropy: the most that they can need."""
    logp_M, entropy_M = linear_logprobs(x_MD, weight_VD, targets_M, with_entropy=True)
    weights_M = torch.linspace(0.5, 1.5, len(x_MD), dtype=logp_M.dtype)
    return -(weights_M * (logp_M + 0.01 * entropy_M)).sum()


WAYS = {f.__name__: f for f in (plain, ours, log_probabilities)}


def inputs(M: int, V: int, D: int):
    generator = torch.Generator().manual_seed(0)
    x_MD = torch.randn(M, D, generator=generator).requires_grad_()
    weight_VD = torch.empty(V, D).normal_(std=0.03, generator=generator).requires_grad_()
    return x_MD, weight_VD, torch.randint(0, V, (M,), generator=generator)


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def measure(way: str) -> int:
    """Bytes above the inputs and their gradients; to be called first thing in a process."""
    WAYS[way](*inputs(3, 50, 8)).backward()  # what is loaded once is not the loss's
    x_MD, weight_VD, targets_M = inputs(TOKENS, V, D)
    before = resident("VmRSS")
    WAYS[way](x_MD, weight_VD, targets_M).backward()
    return resident("VmHWM") - before - x_MD.grad.nbytes - weight_VD.grad.nbytes


@functools.cache
def peak(way: str) -> int:
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", f"from tests.kernels import test_head_memory as t\n"
         f"print(t.measure({way!r}))"],
        cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, text=True, capture_output=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.parametrize("way", ["ours", "log_probabilities"])
def test_under_a_tenth_of_the_plain_way(way):
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if peak.cache_info().currsize == 0 and pages < 10 << 30:
        pytest.skip("the plain way needs 9 GB")
    print(f"{way}: {peak(way) / 1e6:,.0f} MB, plain: {peak('plain') / 1e6:,.0f} MB")
    assert peak("plain") > 2.5 * 4 * TOKENS * V, "log-probabilities and two gradients, nearly"
    assert peak(way) < peak("plain") / 10


@pytest.mark.parametrize("way", ["ours", "log_probabilities"])
def test_gradients_to_five_digits_of_fp64(way):
    """All of the vocabulary and of the hidden size, three chunks of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_ROWS", 16)
        x_MD, weight_VD, targets_M = inputs(40, V, D)
        assert cross_entropy.chunk_rows(weight_VD) == 16
        got = torch.autograd.grad(WAYS[way](x_MD, weight_VD, targets_M), (x_MD, weight_VD))
    x_MD, weight_VD = (t.detach().double().requires_grad_() for t in (x_MD, weight_VD))
    log_p_MV = F.linear(x_MD, weight_VD).log_softmax(-1)
    logp_M = log_p_MV.gather(1, targets_M[:, None])[:, 0]
    loss = -logp_M.sum()
    if way == "log_probabilities":
        weights_M = torch.linspace(0.5, 1.5, len(x_MD)).double()
        loss = -(weights_M * (logp_M - 0.01 * (log_p_MV.exp() * log_p_MV).sum(-1))).sum()
    for ours_, theirs in zip(got, torch.autograd.grad(loss, (x_MD, weight_VD)), strict=True):
        assert (ours_ - theirs).abs().max() < 1e-5 * theirs.abs().max()
