"""`qwenlib plan`: the planner's numbers, tables and one JSON line, refusals with code 2."""

import dataclasses
import json
import re

import pytest
from typer.testing import CliRunner

from qwenlib.cli import app
from qwenlib.model.planner import Serving, Training, plan
from qwenlib.model.presets import PRESETS


def call(*arguments):
    done = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def last_line(done):
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_tables_come_first_and_one_json_line_last():
    done = call("--preset", "report-72b", "--gpus", 2048)
    assert done.exit_code == 0, done.output
    assert last_line(done) == {"ok": True, "mode": "train",
                               **plan("report-72b", gpus=2048).as_json()}  # fmt: skip
    for text in ("report-72b", "not published", "activations", "fits in 80 GB", "gpu hours",
                 "18,000,000,000,000"):  # fmt: skip
        assert text in done.stdout


def test_json_alone():
    done = call("7b", "--json", "--gpu", "a100-80gb", "--tokens", "1e9", "--checkpointing", "full")
    (line,) = done.stdout.strip().splitlines()
    wanted = plan("7b", gpu="a100-80gb", tokens=1e9, checkpointing="full").as_json()
    assert json.loads(line) == {"ok": True, "mode": "train", **wanted}


def test_serving():
    done = call("moe-a2.7b", "--mode", "serve", "--batch", 8, "--prompt-length", 2000)
    wanted = plan("moe-a2.7b", "serve", batch=8, prompt_length=2000).as_json()
    assert last_line(done) == {"ok": True, "mode": "serve", **wanted}
    assert "largest batch" in done.stdout and "bandwidth" in done.stdout


def test_what_does_not_fit_says_so_and_is_no_error():
    done = call("72b", "--gpus", 1)
    assert done.exit_code == 0 and "DOES NOT FIT in 80 GB" in done.stdout
    assert last_line(done)["fits"] is False


def test_a_step_in_tokens_is_a_step_in_rows():
    rows = last_line(call("7b", "--json", "--global-batch", 256))
    tokens = last_line(call("7b", "--json", "--batch-tokens", 256 * 4096))
    assert tokens == rows and rows["settings"]["global_batch"] == 256
    longer = call("7b", "--json", "--batch-tokens", 2**20, "--sequence-length", 8192)
    assert last_line(longer)["settings"]["global_batch"] == 128


def test_a_model_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["3b"].to_hf()))
    assert last_line(call(tmp_path, "--json"))["parameters"]["total"] == 3_085_938_688


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["7c"], "unknown model '7c'; did you mean '7b'"),
        (["7b", "--gpu", "h100"], "did you mean 'h100-sxm' or 'h100-pcie'"),
        (["7b", "--mode", "sreve"], "did you mean 'serve'"),
        (["7b", "--batch", 3], "setting of mode 'train' 'batch'"),
        (["7b", "--mode", "serve", "--loss-chunk", 0], "setting of mode 'serve' 'loss_chunk'"),
        (["7b", "--batch-tokens", 5000], "in rows of 4096 tokens"),
        (["7b", "--batch-tokens", 8192, "--global-batch", 2], "stands for --global-batch"),
        (["7b", "--mode", "serve", "--batch-tokens", 4096], "of mode train"),
        ([], "give one model"),
        (["7b", "--preset", "7b"], "give one model"),
    ],
)
def test_refusals_exit_with_2_and_name_the_thing(arguments, message):
    done = call(*arguments, "--json")
    assert done.exit_code == 2
    assert last_line(done)["ok"] is False and message in last_line(done)["error"]
    assert len(done.stdout.strip().splitlines()) == 1


def test_a_broken_config_exits_with_2(tmp_path):
    (tmp_path / "config.json").write_text("{")
    done = call(tmp_path)
    assert done.exit_code == 2 and str(tmp_path / "config.json") in last_line(done)["error"]


def test_the_help_states_the_real_defaults():
    from typer.main import get_command

    options = {o.name: o for o in get_command(app).commands["plan"].params}
    for kind in (Training, Serving):
        for field in dataclasses.fields(kind):
            if field.name in ("config", "model", "assumed"):
                continue
            help_ = options[field.name].help
            assert "[" not in help_, "rich would take it for markup and hide it"
            stated = re.search(r"\(default (.*)\)", help_).group(1)
            default = getattr(field.default, "name", field.default)
            if field.name == "gpus":
                assert f"{'train' if kind is Training else 'serve'} {default}" in stated
            elif default is not None:
                assert stated == (f"{default:g}" if isinstance(default, float) else str(default))
