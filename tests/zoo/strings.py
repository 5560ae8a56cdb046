"""Graphs with strings (BYTES) in, out and inside."""

from __future__ import annotations

import numpy as np

from tests.zoo.building import Arrays, Graph, anything, integers, normal, words, writer

OPSET = 20
"""The first with every operator on strings."""


def graphs() -> list[Graph]:
    """All of this module."""
    return [*_rows(), *_without_batch()]


def _rows() -> list[Graph]:
    """Each row by itself."""
    labels = '<string[3] labels = {"zero", "one", "zwei"}>'
    return [
        Graph(
            "string_concat",
            writer(
                "(string[n, 2] a, string[n, 2] b) => (string[n, 2] y) { y = StringConcat (a, b) }",
                opset=OPSET,
            ),
            lambda rng, n: {"a": words(rng, n, 2), "b": words(rng, n, 2)},
            batched=True,
        ),
        Graph(
            "string_match",
            writer(
                '(string[n] x) => (bool[n] y) { y = RegexFullMatch <pattern = "[a-z,]*"> (x) }',
                opset=OPSET,
            ),
            lambda rng, n: {"x": words(rng, n)},
            batched=True,
        ),
        Graph(
            "string_equal",
            writer(
                "(string[n, 3] a, string[n, 3] b) => (bool[n, 3] y) { y = Equal (a, b) }",
                opset=OPSET,
            ),
            lambda rng, n: {name: words(rng, n, 3, of=("a", "b", "b\0")) for name in ("a", "b")},
            batched=True,
        ),
        Graph(
            "string_labels",
            writer(
                f"(int64[n] ids) => (string[n] y) {labels} {{ y = Gather (labels, ids) }}",
                opset=OPSET,
            ),
            lambda rng, n: {"ids": integers(rng, 0, 3, n)},
            batched=True,
        ),
        Graph(
            "string_chosen",
            writer(
                "(bool[n] first, string[n] a, string[n] b, float[n] real) => (string[n] y, float[n] z) "
                "{ y = Where (first, a, b)  z = Neg (real) }",
                opset=OPSET,
            ),
            lambda rng, n: {
                "first": anything(rng, "bool", n),
                "a": words(rng, n),
                "b": words(rng, n),
                "real": normal(rng, n),
            },
            batched=True,
        ),
        Graph(
            "string_of_number",
            writer("(int32[n, 2] x) => (string[n, 2] y) { y = Cast <to = 8> (x) }", opset=OPSET),
            lambda rng, n: {"x": anything(rng, "int32", n, 2)},
            batched=True,
        ),
        Graph(
            "number_of_string",
            writer("(string[n] x) => (double[n] y) { y = Cast <to = 11> (x) }", opset=OPSET),
            lambda rng, n: {"x": words(rng, n, of=("1", "-2.5", "1e30", "NaN", "INF", "0"))},
            batched=True,
        ),
        Graph(
            "string_ngrams",
            writer(
                '(string[n, 4] x) => (float[n, 3] y) { y = TfIdfVectorizer <mode = "TF", '
                "min_gram_length = 1, "
                "max_gram_length = 1, max_skip_count = 0, ngram_counts = [0], ngram_indexes = [0, 1, 2], "
                'pool_strings = ["a", "b", "c"]> (x) }',
                opset=OPSET,
            ),
            lambda rng, n: {"x": words(rng, n, 4, of=("a", "b", "c", "d"))},
            batched=True,
        ),
        Graph(
            "string_passed_on",
            writer(
                "(string[n, d] x) => (string[n, d] y, string[n, d] x) { y = Identity (x) }",
                opset=OPSET,
            ),
            lambda rng, n: {"x": words(rng, n, n % 3)},
            batched=True,
        ),
    ]


def _without_batch() -> list[Graph]:
    def any_rank(rng: np.random.Generator, n: int) -> Arrays:
        return {"x": words(rng, *[(), (n,), (n, 1, 2)][n % 3])}

    return [
        Graph(
            "string_split",
            writer(
                "(string[n] x) => (string[n, most] pieces, int64[n] counts) "
                '{ pieces, counts = StringSplit <delimiter = ","> (x) }',
                opset=OPSET,
            ),
            lambda rng, n: {"x": words(rng, n, of=("a", "a,b", "a,b,c", ""))},
            batched=False,
        ),
        Graph(
            "string_normalised",
            writer(
                '(string[c] x) => (string[k] y) { y = StringNormalizer <case_change_action = "UPPER", '
                'is_case_sensitive = 1, locale = "C", stopwords = ["b"]> (x) }',
                opset=OPSET,
            ),
            lambda rng, n: {"x": words(rng, n, of=("a", "b", "c", "word"))},
            batched=False,
        ),
        Graph(
            "string_scalar",
            writer("(string x) => (string y) { y = StringConcat (x, x) }", opset=OPSET),
            lambda rng, n: {"x": words(rng)},
            batched=False,
        ),
        Graph(
            "string_any_rank",
            writer("(string[] x) => (string[] y) { y = Identity (x) }", opset=OPSET),
            any_rank,
            batched=False,
        ),
        Graph(
            "string_fixed",
            writer("(string[2, 3] x) => (string[3, 2] y) { y = Transpose (x) }", opset=OPSET),
            lambda rng, n: {"x": words(rng, 2, 3)},
            batched=False,
        ),
        Graph(
            "string_unique",
            writer("(string[n] x) => (string[k] y) { y = Unique (x) }", opset=OPSET),
            lambda rng, n: {"x": words(rng, n)},
            batched=False,
        ),
        Graph(
            "string_optional",
            writer(
                '(string[n] x, string[1] tail = {"!"}) => (string[n] y) { y = StringConcat (x, tail) }',
                opset=OPSET,
            ),
            lambda rng, n: {"x": words(rng, n)} | ({} if n % 2 else {"tail": words(rng, 1)}),
            batched=True,
        ),
    ]
