"""The parity battery: green on the library, red and pointing at the block when one is wrong."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from qwenlib import kernels
from qwenlib.cli import app
from qwenlib.evaluation import verify
from qwenlib.model import Qwen, QwenConfig, presets, save_pretrained


def test_all_shapes_agree():
    """Seven dense sizes and two MoE models: 1e-5 and 2e-5, gradients included."""
    cases = list(verify.battery())
    assert [case.name for case in cases if not case.passed] == []
    assert len(cases) == 9 * 6
    names = {case.name.split(",")[0] for case in cases}
    assert names == set(presets.PRESETS) | set(presets.MOE)
    for kind in ("left padding", "right padding", "packed", "gradients", "tied head"):
        assert sum(case.name.endswith(kind) for case in cases) >= 9
    assert all(case.tolerance <= 2e-5 for case in cases)
    assert max(case.difference for case in cases) > 0, "nothing was compared"


@pytest.mark.parametrize("name", ["0.5b", "72b", "moe-57b-a14b"])
def test_scaled_shapes_keep_what_makes_the_model(name):
    full, small = presets.find(name), verify.scaled_down(presets.find(name))
    for field in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta",
                  "tie_word_embeddings"):  # fmt: skip
        assert getattr(full, field) == getattr(small, field)
    assert small.head_dim * small.num_attention_heads == small.hidden_size
    if full.moe:
        assert (small.moe.num_experts, small.moe.num_experts_per_tok) == (64, 8)


def test_redrawn_parameters_are_far_from_their_defaults():
    model = verify.redraw(Qwen(verify.scaled_down(presets.find("7b"))))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.std().item() == pytest.approx(0.5, rel=0.35), name
        elif parameter.dim() == 1:
            assert 0.5 <= parameter.min() and parameter.max() <= 1.5 and parameter.std() > 0.2


@pytest.mark.parametrize(
    ("block", "first"),
    [
        ("model.embed_tokens", "embed_tokens"),
        ("model.layers.0.self_attn.q_proj", "layers.0.self_attn"),
        ("model.layers.1.self_attn.o_proj", "layers.1.self_attn"),
        ("model.layers.1.mlp.up_proj", "layers.1.mlp"),
        ("model.norm", "norm"),
        ("lm_head", "logits"),
    ],
)
def test_the_first_block_that_is_off_is_named(block, first):
    model, theirs = verify.drawn_pair(verify.scaled_down(presets.find("7b")))
    ids = verify._ids(2, 0)
    assert verify._compare("same", model, theirs, ids, None, 1e-5).first is None
    part = model.get_submodule(block)
    part.weight = torch.nn.Parameter(1.01 * part.weight)  # the twin keeps the tensor of before
    case = verify._compare("other", model, theirs, ids, None, 1e-5)
    assert not case.passed and case.first == first


def test_a_nan_is_a_failure():
    assert not verify.Case("nan", float("nan"), 1e-5).passed
    model, theirs = verify.drawn_pair(verify.scaled_down(presets.find("7b")))
    down = model.model.layers[0].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.clone().index_fill(0, torch.tensor(0), math.nan))
    case = verify._compare("nan", model, theirs, verify._ids(2, 0), None, 1e-5)
    assert not case.passed and case.first == "layers.0.mlp"
    assert not verify._gradients("nan", model, theirs, verify._ids(2, 0), 1e-5).passed


def folder(path) -> str:
    config = QwenConfig(
        vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return str(save_pretrained(verify.redraw(Qwen(config)), path))


def test_command_on_a_folder(tmp_path, monkeypatch):
    source = folder(tmp_path)
    done = CliRunner().invoke(app, ["verify", source, "--json"])
    line = json.loads(done.stdout)
    assert done.exit_code == 0 and line["failed"] == [] and line["cases"] == 4
    assert 0 <= line["max_abs_diff"] < 1e-4
    norm = kernels.rms_norm
    monkeypatch.setattr(kernels, "rms_norm", lambda x, gain, eps: norm(x, gain, 0.1))
    done = CliRunner().invoke(app, ["verify", source])
    line = json.loads(done.stdout.splitlines()[-1])
    assert done.exit_code == 1 and "logits" in line["failed"]
    assert line["first"]["logits"] == "layers.0.self_attn"
    assert "first block that diverges: layers.0.self_attn" in done.stdout


def test_command_names_what_it_cannot_open(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    done = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert done.exit_code == 2 and "mamba" in done.stderr
