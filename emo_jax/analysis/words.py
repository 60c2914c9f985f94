"""What a cluster is about, from its text: enriched words, a name made of them, and places where its tokens occur."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
from jaxtyping import Int

from emo_jax.analysis.text import Text
from emo_jax.data.tokenizer import Tokenizer

WORDS = 20
NAME_WORDS = 3
LEAST_COUNT = 5  # of a word's tokens in a cluster
CONTEXTS = 12
BEFORE = 10  # tokens of a context
_LETTERS = re.compile(r"[^\W\d_]{2,}")


class Words:
    """The words of a text, each token a part of one: a word begins with a token that begins with white space, or where letters
    end or begin."""

    def __init__(self, text: Text, tokenizer: Tokenizer):
        self.text = text
        self.pieces, self.piece_of_token = _pieces(text, tokenizer)
        letters = lambda place: np.array([not piece or piece[place].isalpha() for piece in self.pieces])
        joins, open_ = letters(0)[self.piece_of_token], letters(-1)[self.piece_of_token]
        begins = ~(joins & np.concatenate([[False], open_[:-1]]))
        begins[text.starts[:-1]] = True
        word_of_token = np.cumsum(begins) - 1
        firsts = np.flatnonzero(begins)
        spelled = [self.spelled(low, high).strip() for low, high in zip(firsts, np.append(firsts[1:], len(begins)))]
        self.vocabulary = sorted(set(spelled))
        numbers = {word: i for i, word in enumerate(self.vocabulary)}
        self.word_of_token = np.array([numbers[word] for word in spelled])[word_of_token]
        self.totals = np.bincount(self.word_of_token, minlength=len(self.vocabulary))
        self.document_totals = self._documents(np.ones(len(begins), bool))

    def enriched(self, where: np.ndarray) -> list[dict[str, Any]]:
        """The words that tokens of `where` (bool [n]) belong to more often than other tokens do: by the root of the count times
        the logarithm of the lift (the cluster's share of the word over its share of the text). A word must be in several
        documents."""
        counts = np.bincount(self.word_of_token[where], minlength=len(self.vocabulary))
        lift = counts / np.maximum(self.totals, 1) / max(where.mean(), 1e-30)
        documents = self._documents(where)
        use = (counts >= LEAST_COUNT) & (lift > 1) & (documents > 1)
        score = np.where(use, np.sqrt(counts) * np.log(np.maximum(lift, 1e-9)), 0)
        best = [i for i in np.argsort(-score, kind="stable")[:4 * WORDS] if score[i] > 0 and self.vocabulary[i]]
        return [{"text": self.vocabulary[i], "count": int(counts[i]), "lift": float(lift[i])} for i in best[:WORDS]]

    def contexts(self, where: np.ndarray, seed: int = 0) -> list[dict[str, Any]]:
        """Places of the cluster, each in another document, drawn at random."""
        places = np.random.default_rng(seed).permutation(np.flatnonzero(where))
        documents = self.text.documents[places]
        places = places[np.sort(np.unique(documents, return_index=True)[1])[:CONTEXTS]]
        return [self._context(int(place)) for place in places]

    def spelled(self, low: int, high: int) -> str:
        return "".join(self.pieces[i] for i in self.piece_of_token[low:high])

    def _context(self, place: int) -> dict[str, Any]:
        document = int(self.text.documents[place])
        start, end = self.text.starts[document:document + 2].tolist()
        return {"document": document, "position": place - start, "before": self.spelled(max(start, place - BEFORE), place),
                "token": self.spelled(place, place + 1), "after": self.spelled(place + 1, min(end, place + 1 + BEFORE))}

    def _documents(self, where: np.ndarray) -> Int[np.ndarray, "W"]:
        """In how many documents each word has tokens of `where`."""
        pairs = np.unique(self.text.documents[where].astype(np.int64) * len(self.vocabulary) + self.word_of_token[where])
        return np.bincount(pairs % len(self.vocabulary), minlength=len(self.vocabulary))


def _pieces(text: Text, tokenizer: Tokenizer) -> tuple[list[str], Int[np.ndarray, "n"]]:
    """(different texts, which of them each token has). A character of several tokens is the text of its last one."""
    ids, of_token = np.unique(text.tokens, return_inverse=True)
    alone = [tokenizer.decode([i]) for i in ids.tolist()]
    numbers = {piece: i for i, piece in enumerate(dict.fromkeys(alone))}
    found = np.array([numbers[piece] for piece in alone])[of_token]
    partial = np.array(["\ufffd" in piece for piece in alone])[of_token]
    for document in np.unique(text.documents[partial]).tolist():
        low, high = text.starts[document:document + 2].tolist()
        more = tokenizer.stream([])
        for token in range(low, high):
            found[token] = numbers.setdefault(more([int(text.tokens[token])]), len(numbers))
    return list(numbers), found


def name(words: list[dict[str, Any]], label: str, taken: Counter) -> str:
    """Of a cluster: its most enriched words with letters, none the beginning of another; else any; else its label. Numbers tell
    clusters of one name apart."""
    chosen: list[str] = []
    for word in [w["text"] for w in words if _LETTERS.fullmatch(w["text"])] or [w["text"] for w in words]:
        low = word.lower()
        if not any(low.startswith(c.lower()) or c.lower().startswith(low) for c in chosen):
            chosen.append(word)
        if len(chosen) == NAME_WORDS:
            break
    made = " · ".join(chosen) or label or "(no words)"
    taken[made] += 1
    return made if taken[made] == 1 else f"{made} ({taken[made]})"
