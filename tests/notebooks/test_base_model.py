"""Chapters 07, 08 and 10 to 12 begin with a model of another tokenizer and chat layout."""

import json
import random
import shutil

import pytest
import torch

from qwenlib import stages
from qwenlib.data import corpora, shards
from qwenlib.data.retrieval import passkey_text
from qwenlib.data.tasks import generate_tasks
from qwenlib.model import Qwen, QwenConfig, load_pretrained, save_pretrained
from qwenlib.tokenizer import Tokenizer, train_bpe
from qwenlib.tokenizer.control import IM_END

TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a stub.<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAPTERS = ["07_context_extension", "08_sft", "10_dpo", "11_grpo", "12_evaluation"]
DATA = "04_pretraining_data"
TEXTS = [f"Document {i} says that the sea is wide and the year is {i}. " * 9 for i in range(300)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`base`, a model unlike the walk's, and a run folder with no more than chapter 04's data."""
    root = tmp_path_factory.mktemp("base_model")
    questions = [task.question + task.solution for task in generate_tasks(60, 0)]
    noise = [passkey_text(3, 0.5, random.Random(i))[0] for i in range(5)]
    plain = Tokenizer.from_merges(train_bpe([*questions, *noise, *TEXTS[:20]], 700))
    tokenizer = Tokenizer(json.loads(plain._full.to_str()), TEMPLATE, pad_token=IM_END)
    shape = QwenConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    # bf16, as released weights are stored: the chapters train in fp32.
    save_pretrained(Qwen(shape).initialise(0), root / "base", tokenizer, torch.bfloat16)

    folder = root / "runs" / DATA
    theirs = Tokenizer.from_merges(train_bpe(TEXTS[:3], 300))
    for name, texts in (("train", TEXTS), ("heldout", TEXTS[:100])):
        documents = [corpora.Document(str(i), t, "a", "b", "c") for i, t in enumerate(texts)]
        corpora.write_parquet(documents, folder / "text" / f"{name}.parquet")
        ids = ([*theirs.encode(t), theirs.end_of_text_id] for t in texts)
        shards.write_shards(folder / "tokens" / name, ids, theirs.vocab_size)
    done = {"status": "done", "profile": "smoke", "fingerprint": "", "outputs": {}}
    stages.write_json(folder / "results.json", done)
    return root


def execute(name, run_dir, **changes):
    """Run a chapter's cells in this process; returns its variables."""
    path = stages.find_notebook(name)
    found = stages.notebook_parameters(path)
    given = {
        "profile": "smoke", "run_dir": str(run_dir), "wandb_mode": "disabled",
        "missing_input": "stop", "device": "cpu",
    }  # fmt: skip
    space = {key: p.default for key, p in found.items()} | given | changes
    space["__annotations__"] = {key: str(p.type) for key, p in found.items()}
    for cell in stages.notebook_code(path):
        exec(compile(cell, path.name, "exec"), space)
    return space


@pytest.fixture(autouse=True)
def small_and_quiet(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_begins_with_the_named_model(home, name, capsys):
    runs = home / "runs"
    execute(name, runs, base_model=str(home / "base"))
    assert f"base_model={home / 'base'} stands in for" in capsys.readouterr().out
    results = json.loads((runs / name / "results.json").read_text())
    assert results["status"] == "done" and results["parameters"]["base_model"]
    made = {path.name for path in runs.iterdir()} - set(CHAPTERS)
    assert made == {DATA}, "no earlier stage was built"
    used = set(results["fingerprint_parts"]["inputs"])
    reads_text = name in ("07_context_extension", "12_evaluation")
    assert used - set(CHAPTERS[1:4]) == {"base_model", *([DATA] if reads_text else [])}
    if name == "12_evaluation":
        assert list(results["metrics"]["exact_match"]) == ["base", "SFT", "DPO", "GRPO"]
        return
    before, after = (load_pretrained(f) for f in (home / "base", runs / name / "model"))
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters())]
    assert after.config.vocab_size == before.config.vocab_size
    assert any(moved) or name == "11_grpo", "a stub's answers earn nothing, so GRPO may stand still"
    assert {p.dtype for p in after.parameters()} == {torch.float32}
    text = "The sea <|im_end|>"
    theirs, ours = (Tokenizer.from_pretrained(f) for f in (home / "base", runs / name / "model"))
    assert theirs.encode(text) == ours.encode(text) and ours.default_system == "You are a stub."


def test_a_chain_goes_on_from_the_stage_before(home, tmp_path):
    """SFT on the named model, DPO on SFT's: the task vector is the difference of the two."""
    base = str(home / "base")
    execute("08_sft", tmp_path, base_model=base)
    space = execute("10_dpo", tmp_path)
    assert space["p"].merge_base == base and space["base_folder"] == home / "base"
    assert any(bool(t.any()) for t in space["tau"].values())
    space = execute("10_dpo", tmp_path, base_model=base)
    assert not any(bool(t.any()) for t in space["tau"].values())
    shape = load_pretrained(base).config.replace(intermediate_size=40)
    other = save_pretrained(Qwen(shape).initialise(0), tmp_path / "other")
    with pytest.raises(ValueError, match=f"{other} .*gate_proj.* merge_base"):
        execute("10_dpo", tmp_path, merge_base=str(other))


def test_evaluation_of_the_named_model_alone(home, tmp_path):
    shutil.copytree(home / "runs" / DATA, tmp_path / DATA)
    space = execute("12_evaluation", tmp_path, base_model=str(home / "base"))
    assert list(space["models"]) == ["base"] and len(space["paired"]) == 0


@pytest.mark.slow
@pytest.mark.network
def test_sft_of_smollm2(tmp_path):
    settings = {"max_steps": 1, "learning_rate": 2e-5, "eval_tasks": 2, "conversations": 10}
    space = execute("08_sft", tmp_path, base_model="smollm2-135m", **settings)
    assert space["model"].config.vocab_size == 49_152
    assert space["parity"].same_template and space["parity"].same_greedy
    assert 0 < float(space["history"].loss.iloc[-1]) < 4, "a real model starts far below ln 49152"
