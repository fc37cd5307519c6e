import pytest

from qwenlib import stages


@pytest.mark.parametrize("profile", ["tiny", "small", "full"])
def test_sweep_uses_the_recipe_of_the_run_it_predicts(profile):
    """A law holds for one recipe: chapters 05 and 06 must agree on it, profile by profile."""
    ours = stages.load_chapter("05_scaling_laws").tables[profile]
    theirs = stages.load_chapter("06_pretraining").tables[profile]
    for key in ("seq_len", "batch_rows", "rope_theta", "eval_rows", "autocast"):
        assert ours[key] == theirs[key], key
    assert ours["head_dim"] == theirs["hidden_size"] // theirs["num_attention_heads"]
    assert ours["ffn_ratio"] == pytest.approx(
        theirs["intermediate_size"] / theirs["hidden_size"], abs=0.3
    )
    assert max(ours["hidden_sizes"]) < theirs["hidden_size"]
    tokens = theirs["max_steps"] * theirs["batch_rows"] * theirs["seq_len"]
    assert max(ours["sweep_tokens"]) < tokens
    assert len(ours["layers"]) == len(ours["hidden_sizes"]) >= 2
    for width in ours["hidden_sizes"]:
        assert width % ours["head_dim"] == 0
