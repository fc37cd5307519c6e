"""What a finished walk must hold. Runs where QWENLIB_RUN names the run folder (CI does)."""

import json
import os
from pathlib import Path

import pytest

RUN = os.environ.get("QWENLIB_RUN")
pytestmark = pytest.mark.skipif(
    not RUN, reason="needs a finished walk: set QWENLIB_RUN to its folder"
)
MODELS = (
    "03_mixture_of_experts", "06_pretraining", "07_context_extension", "08_sft", "10_dpo",
    "11_grpo",
)  # fmt: skip


def results(stage: str) -> dict:
    return json.loads((Path(RUN) / stage / "results.json").read_text())


def stages() -> list[str]:
    return sorted(path.parent.name for path in Path(RUN).glob("*/results.json"))


def test_every_stage_is_done_with_all_checks_passed():
    assert len(stages()) >= 12
    for stage in stages():
        record = results(stage)
        assert record["status"] == "done", stage
        assert record["checks"], f"{stage} checks nothing"
        failed = [check["text"] for check in record["checks"] if not check["passed"]]
        assert not failed, f"{stage}: {failed}"


def test_goals_of_the_walk():
    pre, ext = results("06_pretraining")["metrics"], results("07_context_extension")["metrics"]
    sft = results("08_sft")["metrics"]
    dpo, grpo = results("10_dpo")["metrics"], results("11_grpo")["metrics"]
    assert pre["prediction_error"] < 0.05
    assert pre["base_exact_match"] < 0.05 and sft["exact_match"] > 0.30
    assert dpo["implicit_accuracy"] > 0.70
    assert grpo["gain_points"] >= 10
    assert ext["passkey_without"] < 0.30 and ext["passkey_with"] >= 0.90


def test_the_walk_stays_within_its_time():
    """15 minutes on two free cores; half as much again where a machine is shared."""
    assert sum(results(stage)["seconds"] for stage in stages()) < 1.5 * 15 * 60


@pytest.mark.parametrize("stage", MODELS)
def test_model_folders_open_in_transformers(stage):
    from qwenlib.evaluation.parity import compare_with_transformers

    parity = compare_with_transformers(
        Path(RUN) / stage / "model", ["def f(x):\n", "The sky is", "State the final answer: 3 + 4"]
    )
    assert parity.logits_difference < 1e-3
    assert parity.same_greedy and parity.same_ids and parity.same_template


def test_report_links_to_every_notebook():
    page = (Path(RUN) / "index.html").read_text(encoding="utf-8")
    for stage in stages():
        assert f"{stage}/notebook.html" in page
        assert (Path(RUN) / stage / "notebook.html").is_file()


def test_stages_hand_on_data_that_other_tools_read():
    import datasets

    conversations = datasets.load_dataset(
        "parquet", data_files=str(Path(RUN) / "08_sft/data/train.parquet"), split="train"
    )
    assert {"messages", "prompt", "answer"} <= set(conversations.column_names)
    pairs = datasets.load_dataset(
        "parquet", data_files=str(Path(RUN) / "10_dpo/data/pairs.parquet"), split="train"
    )
    assert {"prompt", "chosen", "rejected"} <= set(pairs.column_names)
    text = datasets.load_dataset(
        "parquet", data_files=str(Path(RUN) / "04_pretraining_data/text/train.parquet"),
        split="train",
    )  # fmt: skip
    assert {"text", "source", "domain", "language"} <= set(text.column_names)
