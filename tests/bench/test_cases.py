"""Every case in a tiny size, the shared weights, and the refusal to time different outputs."""

import json
import time

import pytest
import torch
from typer.testing import CliRunner

from qwenlib.bench import cases, runner, suite
from qwenlib.bench.cases import Case, Task
from qwenlib.bench.models import draw, transformers_twin, weight_bytes
from qwenlib.cli import app
from qwenlib.model import QwenConfig

CPU, FP32 = torch.device("cpu"), torch.float32
TINY = QwenConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    rope_theta=100.0, tie_word_embeddings=True,
)  # fmt: skip
KEYS = {"name", "about", "ours", "peer", "peer_name", "ratio", "unit", "ratio_low", "ratio_high",
        "rounds"}  # fmt: skip


def tiny(device, dtype):
    return draw(TINY, 0, device, dtype)


def tiny_mixture(device, dtype):
    from qwenlib.model.config import MoEConfig

    moe = MoEConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
    )  # fmt: skip
    return draw(TINY.replace(moe=moe), 0, device, dtype)


def shrunk(case):
    """The same case on a model of a few thousand parameters, or on a few texts."""
    if case.kind == "tokenizer":
        few = {"megabytes": 0.3, "vocab_size": 500} if "vocab_size" in case.sizes else {}
        return case.resized(**({"megabytes": {"code": 0.02, "languages": 0.01}} | few))
    if case.kind == "train":
        few = {"rows": 4, "tokens": 8, "micro_rows": 2, "steps": 2, "memory": False}
        return case.resized(config=TINY, **few)
    small = {"rows": 2, "tokens": 6, "prompt_tokens": (2, 5), "new_tokens": 3, "samples": 2}
    sizes = {key: value for key, value in small.items() if key in case.sizes}
    if case.sizes["rows"] == 1:
        sizes |= {"rows": 1, **({"prompt_tokens": (4, 4)} if "prompt_tokens" in sizes else {})}
    model = tiny_mixture if case.sizes["model"] is suite.mixture else tiny
    return case.resized(model=model, **sizes)


def test_the_sizes_are_as_named():
    for config, millions in ((suite.SMALL, 1.44), (suite.MEDIUM, 6.17)):
        with torch.device("meta"):
            count = sum(p.numel() for p in suite.Qwen(config).parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.005)
    assert len({case.name for case in suite.CASES}) == len(suite.CASES)


@pytest.mark.parametrize("case", suite.CASES, ids=lambda case: case.name)
def test_every_case_runs_and_fills_its_row(case):
    row = runner.measure(shrunk(case), CPU, FP32, 1, bandwidth_gb_s=10.0)
    assert set(row) - {"bandwidth_fraction"} == KEYS
    assert ("bandwidth_fraction" in row) == case.sizes.get("bandwidth", False)
    assert row["name"] == case.name and row["rounds"] == 1
    assert row["unit"] == ("MB/s" if case.kind == "tokenizer" else "tokens/s")
    assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
    assert row["peer_name"].split(", ")[0] in (
        "transformers", "tokenizers", "transformers' Trainer"
    )  # fmt: skip


def test_both_sides_share_every_tensor_and_none_is_trivial():
    net = tiny(CPU, FP32)
    twin = transformers_twin(net)
    theirs = dict(twin.named_parameters())
    for name, parameter in net.named_parameters():
        assert theirs[name].data_ptr() == parameter.data_ptr(), name
        assert not (parameter == parameter.flatten()[0]).all(), f"{name} is constant"
    assert twin.config._attn_implementation == "sdpa" and not twin.training
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    ids_BT = torch.randint(61, (2, 9))
    torch.testing.assert_close(net(ids_BT), twin(ids_BT).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["decode", "prefill", "forward", "train"])
def test_a_peer_that_computes_something_else_is_refused(monkeypatch, kind):
    """A twin with one bias moved must not be timed."""

    def wrong(net):
        twin = transformers_twin(net)
        bias = twin.model.layers[0].self_attn.v_proj.bias
        bias.data = bias.data + 0.5
        return twin

    sizes = {"decode": {"rows": 4, "prompt_tokens": (2, 5), "new_tokens": 8}}
    case = Case("crooked", "forward", "", getattr(cases, kind),
                {"model": tiny, **sizes.get(kind, {"rows": 2, "tokens": 6})})  # fmt: skip
    assert runner.measure(case, CPU, FP32, 1, 10.0)["rounds"] == 1
    monkeypatch.setattr(cases, "transformers_twin", wrong)
    report = runner.run([case], rounds=1, threads=1)
    assert report.rows == [] and set(report.refused) == {"crooked"}
    assert "differ" in report.refused["crooked"]


def test_what_differs_is_named():
    assert cases.tokens_differ([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == (
        "row 1 differs at new token 1: 4 here, 5 there"
    )
    assert "lengths" in cases.tokens_differ([[1, 2]], [[1, 2, 3]])
    assert cases.lengths_differ([[1, 2]], [[3, 4]]) == ""
    ones = torch.ones(3)
    assert cases.logits_differ(ones, ones + 1e-5) == ""
    assert "differ by" in cases.logits_differ(ones, ones * 1.01)
    assert "shape" in cases.logits_differ(ones, torch.ones(4))
    assert "differ by" in cases.logits_differ(ones, ones * torch.nan)
    gradients = {"loss": ones, "a.weight": ones}
    assert cases.gradients_differ(gradients, dict(gradients)) == ""
    moved = gradients | {"a.weight": ones * 2}
    assert cases.gradients_differ(gradients, moved).startswith("a.weight")
    assert "b.bias" in cases.gradients_differ(gradients, gradients | {"b.bias": ones})


def test_the_fastest_peer_is_the_one_compared():
    def nap(seconds):
        return lambda: time.sleep(seconds) or 7

    def make(device, dtype):
        peers = {"slow": nap(0.1), "quick": nap(0.002)}
        return Task(nap(0.03), peers, 10, lambda a, b: "" if a == b else "differ", 1_000_000, 3)

    row = runner.measure(Case("sleep", "forward", "", make), CPU, FP32, 3, bandwidth_gb_s=0.5)
    assert row["peer_name"] == "transformers, quick" and row["ratio"] < 1
    assert row["ours"] <= 10 / 0.03
    # 3 steps of 1 MB in 10 / ours seconds, over 500 MB/s.
    assert row["bandwidth_fraction"] == pytest.approx(3 / (10 / row["ours"]) / 500)


def test_command_line_json(monkeypatch):
    toy = Case("toy-forward", "forward", "two rows", cases.forward,
               {"model": tiny, "rows": 2, "tokens": 6})  # fmt: skip
    gpu = Case("toy-gpu", "forward", "", cases.forward,
               {"model": suite.half_billion, "rows": 1, "tokens": 4})  # fmt: skip
    monkeypatch.setattr(runner, "CASES", (toy, gpu))
    arguments = ["bench", "forward", "--rounds", "2", "--threads", "1", "--device", "cpu"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [row["name"] for row in report["rows"]] == ["toy-forward"]
    assert set(report["rows"][0]) == KEYS and report["rows"][0]["rounds"] == 2
    assert (report["device"], report["threads"], report["dtype"]) == ("cpu", 1, "float32")
    assert report["versions"]["torch"] == torch.__version__
    assert report["skipped"] == {"toy-gpu": "needs a GPU"} and report["refused"] == {}
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "toy-forward" in done.stdout and "ratio" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--name", "zebra"], "there are: decode-1m, decode-6m"),
        (["fly"], "there are: generate, forward"),
        (["forward", "--dtype", "float31"], "there are: float32, bfloat16, float16"),
        (["forward", "--device", "tpu"], "there are: auto, cpu, cuda"),
        (["forward", "--rounds", "0"], "rounds and threads must be at least 1"),
    ],
)
def test_unknown_names_exit_with_2(arguments, message):
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2 and message in json.loads(done.stdout)["error"]


def test_half_precision_compares_logits_of_the_prompt():
    case = Case("bf16", "generate", "", cases.decode,
                {"model": tiny, "rows": 2, "prompt_tokens": (2, 5), "new_tokens": 3})  # fmt: skip
    assert runner.measure(case, CPU, torch.bfloat16, 1, 10.0)["rounds"] == 1


def test_weight_bytes_leave_out_an_untied_embedding():
    tied, untied = tiny(CPU, FP32), draw(TINY.replace(tie_word_embeddings=False), 0, CPU, FP32)
    assert weight_bytes(tied) == weight_bytes(untied)
    assert weight_bytes(tied) == 4 * sum(p.numel() for p in tied.parameters())


def test_tokenizers_run_on_the_cpu():
    for more in (["--dtype", "bfloat16"], ["--device", "cuda"]):
        result = CliRunner().invoke(app, ["bench", "tokenizer", *more])
        assert result.exit_code == 2 and "leave out" in result.stderr


def test_training_keeps_fp32_weights():
    result = CliRunner().invoke(app, ["bench", "train", "--dtype", "bfloat16"])
    assert result.exit_code == 2 and "fp32 weights" in result.stderr


def test_offline_cases_are_skipped(monkeypatch):
    from qwenlib.assets import AssetError
    from qwenlib.bench import text

    def offline(*arguments):
        raise AssetError("no network")

    monkeypatch.setattr(text, "documents", offline)
    report = runner.run([c for c in suite.CASES if c.name == "encode-each"], rounds=1, threads=1)
    assert "no network" in report.skipped["encode-each"]
