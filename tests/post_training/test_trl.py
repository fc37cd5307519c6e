"""TRL as oracle: its own loss code on a tiny Qwen2, against our model and our losses.

TRL's trainers are not built; their `_compute_loss` runs on a stand-in `self` that holds what it
reads. Both models carry the same redrawn weights; values and every gradient must agree.
"""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from qwenlib.model import Qwen, QwenConfig
from qwenlib.post_training.dpo import dpo_loss
from qwenlib.post_training.grpo import completion_mask, group_advantages, grpo_loss
from qwenlib.post_training.sft import labels_from_mask, sequence_logprobs

trl = pytest.importorskip("trl", minversion="1.16", reason="TRL is an optional oracle")
V, PAD = 37, 0
CONFIG = QwenConfig(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    tie_word_embeddings=True,
)  # fmt: skip


def models(seed, temperature=1.0):
    """Our model, and the same weights in transformers with TRL's fused head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    theirs = Qwen2ForCausalLM(Qwen2Config.from_dict(CONFIG.to_hf())).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    ours = Qwen(CONFIG).eval()
    ours.load_state_dict(theirs.state_dict())
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    add_fused_lm_head(theirs, temperature=temperature, outputs=outputs)
    return ours, theirs


def accelerator():
    return SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, autocast=nullcontext,
        gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x,
        unwrap_model=lambda x: x, sync_gradients=True, is_main_process=True,
    )  # fmt: skip


def assert_equal_gradients(ours, theirs):
    other = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            other[name].grad,
            rtol=1e-4,
            atol=1e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def rows(seed, B, T, prompt, lengths):
    """Ids padded on the right, attention mask, completion mask."""
    ids = torch.randint(1, V, (B, T), generator=torch.Generator().manual_seed(seed))
    columns = torch.arange(T)
    attention = (columns < prompt + torch.tensor(lengths)[:, None]).long()
    return ids * attention, attention, attention * (columns >= prompt).long()


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing"), [("sigmoid", 0.0), ("robust", 0.2), ("ipo", 0.0)]
)
def test_dpo_loss_and_gradients(loss_type, label_smoothing):
    from trl import DPOTrainer

    ours, theirs = models(0)
    our_reference, their_reference = models(1)
    ids, attention, completion = rows(2, 6, 14, 4, [10, 3, 7, 5, 9, 1])
    trainer = SimpleNamespace(
        model=theirs, ref_model=their_reference, accelerator=accelerator(), beta=0.2,
        label_smoothing=label_smoothing, loss_types=[loss_type], loss_weights=[1.0],
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=False,
        f_divergence_type="reverse_kl", use_weighting=False, _metrics=defaultdict(
            lambda: defaultdict(list)), _tp_size=1, _total_train_tokens=0,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    inputs = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}
    want = DPOTrainer._compute_loss(trainer, theirs, inputs, False)
    want.backward()

    labels = labels_from_mask(ids, completion)

    def score(model):
        token_logp, mask = sequence_logprobs(model(ids, attention_mask_BS=attention), labels)
        total = token_logp.sum(-1)
        return (total / mask.sum(-1) if loss_type == "ipo" else total).chunk(2)

    policy, reference = score(ours), score(our_reference)
    loss, stats = dpo_loss(
        *policy, *reference, beta=0.2, label_smoothing=label_smoothing, variant=loss_type
    )
    loss.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    assert_equal_gradients(ours, theirs)
    assert all(p.grad is None for p in our_reference.parameters())
    if loss_type != "ipo":  # TRL logs summed log-probs there, we were given means
        logged = trainer._metrics["eval"]
        for key in stats:
            assert stats[key].item() == pytest.approx(logged[key][0], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize(
    ("loss_type", "aggregate"), [("grpo", "sequence"), ("dapo", "token"), ("dr_grpo", "constant")]
)
def test_grpo_loss_and_gradients(loss_type, aggregate):
    from trl import GRPOTrainer

    temperature, P, T = 0.8, 4, 9
    ours, theirs = models(3, temperature)
    ids, _, _ = rows(4, 6, P + T, P, [T] * 6)
    prompt, completion = ids[:, :P], ids[:, P:]
    mask = completion_mask(completion, [1, 2, 3, 4, 5]).long()
    assert mask.sum(-1).unique().numel() > 2  # unequal lengths, or the aggregates would agree
    labels = torch.cat([torch.full((6, P), -100), completion], 1)
    attention = torch.cat([torch.ones(6, P, dtype=torch.long), mask], 1)

    def score(model):
        logits = model(ids, attention_mask_BS=attention)
        return sequence_logprobs(logits, labels, temperature)[0][:, P:]

    noise = torch.randn(2, 6, T, generator=torch.Generator().manual_seed(6)) * 0.3
    current = score(ours)
    old, reference = current.detach() + noise[0], current.detach() + noise[1]
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0, 0.25])
    advantages = group_advantages(rewards, 3)

    trainer = SimpleNamespace(
        model=theirs, accelerator=accelerator(), beta=0.1, epsilon_low=0.2, epsilon_high=0.28,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token",
        loss_type=loss_type, use_vllm=False, aux_loss_enabled=False, _entropy_bonus_enabled=False,
        max_completion_length=T, current_gradient_accumulation_steps=1,
        vllm_importance_sampling_correction=False, _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (
        GRPOTrainer._get_per_token_logps_and_entropies(
            trainer, *args, **{k: v for k, v in kwargs.items() if v is not None}
        )
    )
    inputs = {
        "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion, "completion_mask": mask, "advantages": advantages,
        "old_per_token_logps": old, "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum().float(),
    }  # fmt: skip
    want = GRPOTrainer._compute_loss(trainer, theirs, inputs)
    want.backward()

    total, count, stats = grpo_loss(
        current, old, advantages, mask, reference, clip_low=0.2, clip_high=0.28, kl="k3",
        kl_coef=0.1, aggregate=aggregate, denominator=T if aggregate == "constant" else None,
    )  # fmt: skip
    (total / count).backward()
    torch.testing.assert_close(total / count, want, rtol=1e-5, atol=1e-6)
    assert_equal_gradients(ours, theirs)
    logged = trainer._metrics["eval"]
    assert stats["kl"].item() == pytest.approx(logged["kl"][0], rel=1e-4)
    assert stats["clip/low"].item() == pytest.approx(logged["clip_ratio/low_mean"][0], abs=1e-6)
    assert stats["clip/high"].item() == pytest.approx(logged["clip_ratio/high_mean"][0], abs=1e-6)
