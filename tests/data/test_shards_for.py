"""Chapter 04's documents in the tokens of a given tokenizer."""

import pytest

from qwenlib.data import corpora
from qwenlib.data.shards import shards_for, write_shards
from qwenlib.tokenizer import Tokenizer, train_bpe

TEXTS = ["the cat sat on the mat", "a hat", "Grün 你好 the end"] * 500


@pytest.fixture(scope="module")
def own():
    return Tokenizer.from_merges(train_bpe(TEXTS[:9], 284))


@pytest.fixture
def data(tmp_path, own):
    documents = [corpora.Document(str(i), t, "a", "b", "c") for i, t in enumerate(TEXTS)]
    corpora.write_parquet(documents, tmp_path / "text" / "train.parquet")
    ids = [[*own.encode(text), own.end_of_text_id] for text in TEXTS]
    write_shards(tmp_path / "tokens" / "train", ids, own.vocab_size)
    return tmp_path


def test_the_chapters_own_tokens_serve_its_tokenizer(data, own):
    got = shards_for(own, data, "train", data / "work")
    assert got.directory == data / "tokens" / "train" and not (data / "work").exists()


@pytest.mark.parametrize(
    ("texts", "size"), [(["hat mat sat"] * 3, 282), (["other words"] * 3, 284)]
)
def test_another_tokenizer_gets_the_same_text(data, own, texts, size):
    """One vocabulary of another size, one of the same size with other merges."""
    other = Tokenizer.from_merges(train_bpe(texts, size))
    got = shards_for(other, data, "train", data / "work")
    assert got.directory == data / "work" and got.vocab_size == other.vocab_size
    assert len(got) == len(TEXTS)
    for i in (0, 2, 1023, 1024, 1499):  # the text is read 1,024 rows at a time
        ids = got.document(i).tolist()
        assert other.decode(ids[:-1]) == TEXTS[i] and ids[-1] == other.end_of_text_id
