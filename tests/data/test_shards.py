import json

import numpy as np
import pytest

from qwenlib.data.shards import TokenShards, write_shards

DOCS = [[1, 2, 3], [4], [5, 6]]


def test_round_trip(tmp_path):
    shards = write_shards(tmp_path / "train", iter(DOCS), vocab_size=100)
    again = TokenShards(tmp_path / "train")
    assert len(again) == 3 and again.num_tokens == 6
    assert [again.document(i).tolist() for i in range(3)] == DOCS
    assert again.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert again.tokens.dtype == np.uint16 and isinstance(again.tokens, np.memmap)
    assert again.meta == shards.meta and again.meta["documents"] == 3
    with pytest.raises(IndexError, match="document 3 of 3"):
        again.document(3)


@pytest.mark.parametrize(("vocab_size", "bytes_per_token"), [(65_536, 2), (65_537, 4)])
def test_width_holds_the_largest_id(tmp_path, vocab_size, bytes_per_token):
    shards = write_shards(tmp_path, [[vocab_size - 1, 0]], vocab_size)
    assert shards.document(0).tolist() == [vocab_size - 1, 0]
    assert (tmp_path / "tokens.bin").stat().st_size == 2 * bytes_per_token


@pytest.mark.parametrize("bad", [[100], [-1]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=f"document 1 has token id {bad[0]}"):
        write_shards(tmp_path, [[1], bad], vocab_size=100)


def test_empty_documents_are_refused(tmp_path):
    with pytest.raises(ValueError, match="document 1 has no tokens"):
        write_shards(tmp_path, [[1], []], vocab_size=100)
    with pytest.raises(ValueError, match="no documents"):
        write_shards(tmp_path, [], vocab_size=100)


def test_interrupted_write_leaves_nothing_that_opens(tmp_path):
    write_shards(tmp_path, DOCS, 100)

    def broken():
        yield [1, 2]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_shards(tmp_path, broken(), 100)
    with pytest.raises(FileNotFoundError, match="interrupted"):
        TokenShards(tmp_path)


def test_damaged_copy_is_refused(tmp_path):
    write_shards(tmp_path, DOCS, 100)
    data = (tmp_path / "tokens.bin").read_bytes()
    (tmp_path / "tokens.bin").write_bytes(data[:-2])
    with pytest.raises(ValueError, match="10 bytes"):
        TokenShards(tmp_path)


def test_hash_follows_the_tokens(tmp_path):
    a = write_shards(tmp_path / "a", DOCS, 100).meta["sha256"]
    b = write_shards(tmp_path / "b", DOCS, 100).meta["sha256"]
    c = write_shards(tmp_path / "c", [[1, 2, 3], [4], [5, 7]], 100).meta["sha256"]
    assert a == b != c
    assert json.loads((tmp_path / "a" / "meta.json").read_text())["sha256"] == a
