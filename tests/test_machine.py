"""Estimates of chapter 00 against torch's own counter and hand-worked numbers."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qwenlib import machine

CPU = torch.device("cpu")


def test_matmul_operations_equal_torchs_count():
    a = torch.randn(48, 48)
    with FlopCounterMode(display=False) as counter:
        a @ a
    assert machine.matmul_flops(48) == counter.get_total_flops()


def test_speed_is_operations_over_the_median_time(monkeypatch):
    monkeypatch.setattr(machine, "median_seconds", lambda action, repeats, device: 0.5)
    assert machine.matmul_speed(10, 3, CPU, torch.float32) == 2 * 10**3 / 0.5
    assert machine.copy_speed(1, 3, CPU) == 2 * 2**20 / 0.5


def test_median_leaves_the_warm_up_out():
    calls = []
    machine.median_seconds(lambda: calls.append(1), 4, CPU)
    assert len(calls) == 5


def test_description_is_of_this_machine():
    found = machine.describe()
    assert found.cores >= 1 and found.memory > 2**28 and found.processor
    assert found.best_memory == (found.gpu_memory or found.memory)


def test_estimates_by_hand():
    assert machine.training_flops(72.7e9, 18e12) == pytest.approx(7.85e24, rel=1e-3)
    assert machine.training_memory(7.61e9) == pytest.approx(121.8e9, rel=1e-3)
    assert machine.decode_speed(0.5e9, 1e12) == pytest.approx(1000)


def test_the_exercise_accepts_the_answer_and_hints_at_slips(capsys):
    machine.check_exercise_1(lambda n, d, f: None)
    assert "not solved yet" in capsys.readouterr().out
    machine.check_exercise_1(lambda n, d, f: 6 * n * d / f / 86_400)
    assert "correct" in capsys.readouterr().out
    for wrong, hint in [
        (lambda n, d, f: 2 * n * d / f / 86_400, "forward pass only"),
        (lambda n, d, f: 6 * n * d / f / 3600, "hours"),
        (lambda n, d, f: 6 * n * d / f, "seconds"),
        (lambda n, d, f: 5 * n * d / f / 86_400, "expected"),
        (lambda n, d, f: 6e9 * d / f / 86_400, "should be"),
    ]:
        with pytest.raises(AssertionError, match=hint):
            machine.check_exercise_1(wrong)


def test_fast_bfloat16_reads_the_processors_flags(tmp_path, monkeypatch):
    for flags, want in (("fpu avx2 avx512_bf16", True), ("fpu amx_bf16", True), ("avx2", False)):
        info = tmp_path / "cpuinfo"
        info.write_text(f"flags : {flags}\n")
        monkeypatch.setattr(machine, "Path", lambda _, info=info: info)
        assert machine.fast_bfloat16(CPU) is want
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "absent")
    assert machine.fast_bfloat16("cpu") is False
