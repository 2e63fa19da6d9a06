"""The metrics of the E2E challenge: cases computed by hand, and the official script's own figures."""

import math
import os

import numpy as np
import pytest

from experiments.e2e_nlg import data, metrics


def test_bleu_penalises_a_short_text():
    found = metrics.score(["A b c d"], [["a B c d e", "x y z u v w"]])
    assert found["BLEU"] == pytest.approx(math.exp(1 - 5 / 4))


def test_bleu_adds_up_to_that_of_the_corpus():
    import sacrebleu

    texts = ["the cat sat on the mat today", "it is the pub near a cheap river bar", "none of it fits"]
    first = ["a cat sat on the mat", "it is a pub near a river bar", "no"]
    second = ["the cat sat there", None, "not"]
    references = [[x for x in some if x is not None] for some in zip(first, second, strict=True)]
    whole = sacrebleu.corpus_bleu(texts, [first, second], lowercase=True)
    assert 10 < whole.score < 90
    assert metrics.score(texts, references)["BLEU"] == pytest.approx(whole.score / 100)


def test_nist_weighs_ngrams_by_information():
    # Of three tokens two are "a", of which one comes before the only "b"; the text has two thirds of them.
    expected = (math.log2(3 / 2) + math.log2(3 / 1)) / 2 + math.log2(2 / 1) / 1
    assert metrics.score(["a b"], [["a b a"]])["NIST"] == pytest.approx(expected * 0.5)
    # A second "b" finds no match; the references are 3 and 1 long, on average 2.
    expected = (math.log2(4 / 3) + math.log2(4 / 1)) / 3 + math.log2(3 / 1) / 2
    assert metrics.score(["a b b"], [["a b a", "a"]])["NIST"] == pytest.approx(expected)


def test_rouge_takes_the_best_precision_and_the_best_recall():
    # Of "a c" the recall is 1, and of the other reference the precision 3/4.
    found = metrics.score(["a b c d"], [["a c", "a b c x y z"]])
    assert found["ROUGE-L"] == pytest.approx((1 + 1.44) * 0.75 * 1 / (1 + 1.44 * 0.75))
    assert metrics.score(["u"], [["a c"]])["ROUGE-L"] == 0


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [("", "a", 0), ("a b c", "c b a", 1), ("a b c b d a b", "b d c a b a", 4), ("a a", "a", 1)],
)
def test_common_subsequences(first, second, length):
    assert metrics.longest_common(tuple(first.split()), tuple(second.split())) == length
    assert metrics.longest_common(tuple(second.split()), tuple(first.split())) == length


def test_cider_is_a_clipped_cosine_that_falls_with_the_difference_in_length():
    def rows(text):
        return metrics.cider_statistics(["a b", text], [["a b"], ["c d"]])[:, 0]

    # One token and one pair of tokens are the reference's; there are none of three and four.
    np.testing.assert_allclose(rows("c"), [10 * 2 / 4, 10 / 4 / math.sqrt(2) * math.exp(-1 / 72)])
    # Counted twice, "c" is worth as much as once and makes the text's own norm larger.
    np.testing.assert_allclose(rows("c c")[1], 10 / 4 / (2 * math.sqrt(2)))
    # What is in every document's references is worth nothing.
    found = metrics.cider_statistics(["x a", "x b"], [["x a", "x"], ["x b"]])[:, 0]
    np.testing.assert_allclose(found[1], 10 * 2 / 4)
    np.testing.assert_allclose(found[0], 10 * 2 / 4 / 2)


def test_a_text_of_nothing_is_scored_zero():
    assert set(metrics.score([" . "], [["a b c d e"]]).values()) == {0.0}
    assert set(metrics.score([""], [["a b c d e"]]).values()) == {0.0}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The Café , near X , isn't kid-friendly .", "the café near x is n't kid-friendly"),
        (
            "It does n't cost £20-£25: it's 20-25, £ 3.9;",
            "it does n't cost £ 20 £ 25 it 's 20-25 £ 3.9",
        ),
        ("\"Children's\" 'menu' ... kids '", "children 's menu kids"),
        ("2,500 of them,really - non- smoking.", "2,500 of them really non- smoking"),
    ],
)
def test_treebank_tokens(text, tokens):
    assert metrics.treebank(text) == tuple(tokens.split())


def test_mteval_tokens():
    assert metrics.mteval("A 5-star (cheap) pub, £20.50. It's") == tuple(
        "a 5 - star ( cheap ) pub , £20.50 . it's".split()
    )


@pytest.mark.parametrize(
    ("texts", "references", "message"),
    [
        ([], [], "0 texts"),
        (["a"], [["a"], ["b"]], "1 texts and 2 lists"),
        (["a", "b"], [["a"], []], r"text 1, 'b', are \[\]"),
        (["a"], ["a"], "text 0, 'a', are 'a'"),
        (["a"], [["a", " "]], "text 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(texts, references, message):
    with pytest.raises(ValueError, match=message):
        metrics.score(texts, references)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_the_bootstrap_is_of_corpora_of_texts(name):
    texts = ["the pub is near the river", "it is a bar", "a cheap café in the city", "it is by the river"]
    references = [["the pub is by the river", "a pub"], ["it is a cheap bar"], ["a café in the city"], ["no"]]
    rows = metrics.statistics(texts, references)[name]
    found = metrics.bootstrap(rows, name, 300, seed=1)
    assert found.shape == (300,)
    whole = metrics.score(texts, references)[name]
    assert found.min() < whole < found.max()
    np.testing.assert_array_equal(found, metrics.bootstrap(rows, name, 300, seed=1))
    # Two systems at once are drawn the same texts; texts that are all the same do not vary.
    both = metrics.bootstrap(np.stack([rows, rows[[0] * 4]], axis=1), name, 300, seed=1)
    np.testing.assert_allclose(both[:, 0], found)
    np.testing.assert_allclose(both[:, 1], metrics.METRICS[name].score(rows[0]))


# What the challenge's own script prints for the references of the test set.
OFFICIAL = {
    "first against the rest": {"BLEU": 0.6118, "NIST": 8.9290, "ROUGE-L": 0.6392, "CIDEr": 1.8945},
    "first against all": {"BLEU": 1.0, "NIST": 14.19, "ROUGE-L": 1.0, "CIDEr": 3.43},
}


@pytest.mark.skipif("LORA_JAX_DATA" not in os.environ, reason="set LORA_JAX_DATA to a folder with the data")
@pytest.mark.parametrize("case", OFFICIAL)
def test_the_official_figures(case):
    meanings: dict[str, list[str]] = {}
    for mr, text in data.load_split("test"):
        meanings.setdefault(mr, []).append(text)
    if case == "first against the rest":
        several = [texts for texts in meanings.values() if len(texts) > 1]
        found = metrics.score([texts[0] for texts in several], [texts[1:] for texts in several])
        assert len(several) == 616
        assert round(found["BLEU"], 4) == OFFICIAL[case]["BLEU"]
        assert round(found["NIST"], 4) == OFFICIAL[case]["NIST"]
        assert found["ROUGE-L"] == pytest.approx(OFFICIAL[case]["ROUGE-L"], abs=0.003)
        assert found["CIDEr"] == pytest.approx(OFFICIAL[case]["CIDEr"], abs=0.003)
    else:
        found = metrics.score([texts[0] for texts in meanings.values()], list(meanings.values()))
        assert len(meanings) == 630
        assert {name: round(x, 2) for name, x in found.items()} == OFFICIAL[case]
