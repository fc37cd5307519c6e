"""Quality: rules that count what they remove, a judge's rubric, and a classifier that learns it.

The report (§3.1) lets Qwen2-Instruct judge documents along several dimensions. Scoring trillions of
tokens with a language model is too dear, so the usual recipe (FineWeb-Edu, DCLM) judges a sample
and trains a cheap student on the verdicts. Here the judge is a printed rubric of five points.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qwenlib.data.corpora import Document

_STOP_WORDS = frozenset(
    "the a an of to in is and or for with that this if are be by as on it from not can will "
    "which when at used use".split()
)
_GENERATED = re.compile(r"auto-?generated|generated (?:by|from)|do not edit", re.IGNORECASE)


class TextStats:
    """Counts that several rules share; fractions lie in 0 … 1."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.split("\n") if line.strip()]

    @property
    def mean_word_length(self) -> float:
        return sum(map(len, self.words)) / max(len(self.words), 1)

    @property
    def with_letter(self) -> float:
        """Share of words that have a letter."""
        return sum(any(c.isalpha() for c in w) for w in self.words) / max(len(self.words), 1)

    @property
    def stop_words(self) -> float:
        """Share of words that are common English function words."""
        return sum(w.lower() in _STOP_WORDS for w in self.words) / max(len(self.words), 1)

    @property
    def repeated_lines(self) -> float:
        """Share of lines over 10 characters that occurred before."""
        lines = [line for line in self.lines if len(line) > 10]
        return 1 - len(set(lines)) / len(lines) if lines else 0.0

    @property
    def bullet_lines(self) -> float:
        return sum(line[0] in "-*•" for line in self.lines) / max(len(self.lines), 1)

    @property
    def digits(self) -> float:
        """Share of characters that are digits."""
        return sum(c.isdigit() for c in self.text) / max(len(self.text), 1)

    @property
    def longest_line(self) -> int:
        return max(map(len, self.lines), default=0)

    @property
    def repeated_trigrams(self) -> float:
        """Share of word trigrams that occurred before in the text."""
        grams = list(zip(self.words, self.words[1:], self.words[2:], strict=False))
        return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Rule:
    """A named test; `ok(stats)` is False for a document to be removed."""

    name: str
    ok: Callable[[TextStats], bool]
    why: str


# Gopher's rules (arXiv 2112.11446, table A1) where they fit; its stop-word and letter rules would
# remove all code, so each source has its own list. Generated sources need none.
RULES: dict[str, tuple[Rule, ...]] = {
    "prose": (
        Rule("too short", lambda s: len(s.words) >= 25, "under 25 words"),
        Rule("too long", lambda s: len(s.words) <= 100_000, "over 100,000 words"),
        Rule("word length", lambda s: 3 <= s.mean_word_length <= 10, "mean outside 3 to 10"),
        Rule("few letters", lambda s: s.with_letter >= 0.6, "under 60 % of words have a letter"),
        Rule("few stop words", lambda s: s.stop_words >= 0.06, "under 6 % function words"),
        Rule("bullets", lambda s: s.bullet_lines <= 0.9, "over 90 % bullet lines"),
        Rule("repeated lines", lambda s: s.repeated_lines <= 0.3, "over 30 % repeated lines"),
        Rule("repetition", lambda s: s.repeated_trigrams <= 0.5, "over 50 % repeated trigrams"),
    ),
    "code": (
        Rule("too short", lambda s: len(s.words) >= 25, "under 25 words"),
        Rule("generated", lambda s: not _GENERATED.search(s.text[:600]), "says it is generated"),
        Rule("long line", lambda s: s.longest_line <= 1000, "a line over 1,000 characters"),
        Rule("table", lambda s: s.digits <= 0.15, "over 15 % digits: data, not a program"),
        Rule("repeated lines", lambda s: s.repeated_lines <= 0.4, "over 40 % repeated lines"),
        Rule("repetition", lambda s: s.repeated_trigrams <= 0.5, "over 50 % repeated trigrams"),
    ),
    "languages": (
        Rule("too short", lambda s: len(s.lines) >= 8, "under 8 lines"),
        Rule("few letters", lambda s: s.with_letter >= 0.6, "under 60 % of words have a letter"),
        Rule("repeated lines", lambda s: s.repeated_lines <= 0.3, "over 30 % repeated lines"),
    ),
}
RULES["user"] = RULES["prose"]


def failed_rules(document: Document) -> list[str]:
    """Names of the rules this document breaks; empty for a source without rules."""
    stats = TextStats(document.text)
    return [rule.name for rule in RULES.get(document.source, ()) if not rule.ok(stats)]


def apply_rules(
    documents: Sequence[Document],
) -> tuple[list[Document], Counter[tuple[str, str]], dict[str, Document]]:
    """(kept, removals by (source, rule), one removed example a rule); every broken rule counts."""
    kept: list[Document] = []
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[str, Document] = {}
    for document in documents:
        failed = failed_rules(document)
        for name in failed:
            counts[document.source, name] += 1
            examples.setdefault(f"{document.source}: {name}", document)
        if not failed:
            kept.append(document)
    return kept, counts, examples


# --- the judge ---------------------------------------------------------------------------------

_SENTENCE = re.compile(r"[A-Z][^.!?\n]*(?:\n[^.!?\n]+)*[.!?](?:\s|$)")
_EXAMPLE = re.compile(r"^\s*>>> |::\s*$|^Examples?\b|for example|e\.g\.", re.MULTILINE | re.I)
_CONTRACT = re.compile(r"\b(returns?|raises?|parameters|args|yields?)\b", re.IGNORECASE)
_REASON = re.compile(
    r"\b(because|since|therefore|so that|in order to|instead of|note that|unless|otherwise)\b",
    re.IGNORECASE,
)
RUBRIC = {
    "sentences": "at least two sentences of six words or more",
    "example": "shows an example",
    "contract": "says what goes in or comes out",
    "reason": "gives a reason, a condition or a warning",
    "running text": "a fifth of its words are function words: not a list of names",
}


def judge(text: str) -> dict[str, bool]:
    """Verdict on each point of RUBRIC; the score is their sum, 0 to 5."""
    sentences = [s for s in _SENTENCE.findall(text) if len(s.split()) >= 6]
    return {
        "sentences": len(sentences) >= 2,
        "example": bool(_EXAMPLE.search(text)),
        "contract": bool(_CONTRACT.search(text)),
        "reason": bool(_REASON.search(text)),
        "running text": TextStats(text).stop_words >= 0.2,
    }


def judge_score(text: str) -> int:
    """Points of the rubric that a text earns, 0 to 5."""
    return sum(judge(text).values())


# --- the student -------------------------------------------------------------------------------


@dataclass(frozen=True)
class QualityClassifier:
    """Logistic regression on hashed 1- and 2-grams of words and symbols, with held-out evidence."""

    model: object  # scikit-learn pipeline
    auc: float  # held-out area under the ROC curve
    auc_length: float  # the same for the text's length alone: what the classifier must beat
    heldout_scores: np.ndarray  # [held-out documents], probability of "good"
    heldout_labels: np.ndarray  # [held-out documents], 0 or 1
    heldout_documents: list[Document]

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Probability of "good" for each text, float [len(texts)]."""
        return self.model.predict_proba([text[:_CLASSIFIER_CHARS] for text in texts])[:, 1]

    def threshold(self, keep_share: float) -> float:
        """Score that keeps this share of held-out documents.

        A percentile, because probabilities shift with the share of good labels in the sample.
        """
        if not 0 < keep_share <= 1:
            raise ValueError(f"keep_share is {keep_share}, it must lie in (0, 1]")
        return float(np.quantile(self.heldout_scores, 1 - keep_share))


_CLASSIFIER_CHARS = 3_000


def fit_classifier(
    documents: Sequence[Document], labels: Sequence[int], seed: int, heldout_share: float = 0.25
) -> QualityClassifier:
    """Train on judged documents; whole files are held out, so that no text is half known.

    Raises ValueError when either side has only one class.
    """
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupShuffleSplit
    from sklearn.pipeline import make_pipeline

    texts = [document.text[:_CLASSIFIER_CHARS] for document in documents]
    y = np.asarray(labels)
    splitter = GroupShuffleSplit(1, test_size=heldout_share, random_state=seed)
    train, held = next(splitter.split(texts, y, [d.group for d in documents]))
    for name, side in (("training", y[train]), ("held-out", y[held])):
        if len(set(side.tolist())) < 2:
            raise ValueError(f"all {len(side)} {name} labels are equal; judge more documents")
    # Presence, not counts, of words and of symbols (">>>" marks an example), scaled to length 1:
    # a long text does not score higher for repeating itself.
    features = HashingVectorizer(
        ngram_range=(1, 2),
        n_features=2**16,
        binary=True,
        alternate_sign=False,
        token_pattern=r"\w+|[^\w\s]+",
    )
    model = make_pipeline(
        features,
        LogisticRegression(C=30.0, solver="liblinear", class_weight="balanced", random_state=seed),
    )
    model.fit([texts[i] for i in train], y[train])
    scores = model.predict_proba([texts[i] for i in held])[:, 1]
    return QualityClassifier(
        model=model,
        auc=float(roc_auc_score(y[held], scores)),
        auc_length=float(roc_auc_score(y[held], [len(documents[i].text) for i in held])),
        heldout_scores=scores,
        heldout_labels=y[held],
        heldout_documents=[documents[i] for i in held],
    )
