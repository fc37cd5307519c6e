"""Packed conversations: targets are the assistant's turns, epochs visit each once."""

import functools
from collections import Counter

import pytest
import torch

from qwenlib.data.packing import IGNORE
from qwenlib.data.tasks import generate_tasks
from qwenlib.post_training.conversations import ConversationSampler
from qwenlib.tokenizer import Tokenizer, train_bpe
from qwenlib.tokenizer.chat import encode_chat

LENGTH = 256


@functools.cache
def conversations():
    tasks = [t.messages() for t in generate_tasks(40, 0, families=("chain_sum", "leg_counting"))]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    return [*tasks, turns + [{"role": "user", "content": "Bye"}] + turns[1:]]


@functools.cache
def tokenizer() -> Tokenizer:
    texts = [m["content"] for messages in conversations() for m in messages]
    return Tokenizer.from_merges(train_bpe(texts, 400))


def sampler(batch_size=3, seed=0, length=LENGTH):
    return ConversationSampler(tokenizer(), conversations(), length, batch_size, seed)


def documents(batch):
    """(ids, labels) of each conversation in a batch."""
    for row in range(len(batch.input_ids_BT)):
        for index in batch.document_ids_BT[row].unique().tolist():
            if index >= 0:
                here = batch.document_ids_BT[row] == index
                yield tuple(batch.input_ids_BT[row][here].tolist()), batch.labels_BT[row][here]


def test_targets_are_the_assistants_turns():
    found = {ids: labels.tolist() for ids, labels in documents(sampler(99).batch(0))}
    for messages in conversations():
        ids, mask = encode_chat(tokenizer(), messages)
        labels = found[tuple(ids)]
        assert labels == [token if keep else IGNORE for token, keep in zip(ids, mask)]
        text = tokenizer().decode([token for token in labels if token != IGNORE])
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert text.replace("<|im_end|>", "") == "".join(answers)
        assert text.count("<|im_end|>") == len(answers), "the stop is learnt"


def test_each_epoch_visits_every_conversation_once():
    one = sampler(batch_size=1)
    orders = []
    for epoch in range(2):
        seen = Counter()
        for row in range(one.rows_per_epoch):
            batch = one.batch(epoch * one.rows_per_epoch + row)
            seen.update(ids for ids, _ in documents(batch))
        expected = Counter(tuple(encode_chat(tokenizer(), c)[0]) for c in conversations())
        assert seen == expected and one.dropped == 0
        orders.append(batch.input_ids_BT.tolist())
    assert orders[0] != orders[1], "a new order each epoch"


def test_batch_is_a_function_of_the_step_across_the_epochs_end():
    one, two, single = sampler(), sampler(), sampler(batch_size=1)
    for step in (7, 0, one.steps_per_epoch() - 1, 7):
        a, b = one.batch(step), two.batch(step)
        assert torch.equal(a.input_ids_BT, b.input_ids_BT) and torch.equal(a.labels_BT, b.labels_BT)
        rows = torch.cat([single.batch(3 * step + i).input_ids_BT for i in range(3)])
        assert torch.equal(a.input_ids_BT, rows)
    assert not torch.equal(one.batch(0).input_ids_BT, sampler(seed=1).batch(0).input_ids_BT)
    assert 3 * one.steps_per_epoch() >= one.rows_per_epoch > 3 * (one.steps_per_epoch() - 1)


def test_long_conversations_are_counted_and_none_at_all_is_an_error():
    lengths = sorted(len(encode_chat(tokenizer(), c)[0]) for c in conversations())
    middle = lengths[len(lengths) // 2]
    assert sampler(length=middle).dropped == sum(n > middle for n in lengths) > 0
    with pytest.raises(ValueError, match="no conversation fits in 4 tokens"):
        sampler(length=4)
