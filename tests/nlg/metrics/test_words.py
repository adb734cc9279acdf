"""Words as the COCO scripts split them: what Stanford's PTBTokenizer 3.4.1 answers to these made-up texts."""

import pytest
from texts import score

from darel_hf.nlg.metrics import RougeL, ptb_words


@pytest.mark.parametrize(("text", "words"), [
    ("in the center. close by", "in the center close by"),
    ("in the centre.It is", "in the centre.it is"),
    ("it is low., and", "it is low. and"),
    ("It\u2019s \u201cgood\u201d, isn\u2019t it?", "it 's good is n't it"),
    ("...", ""),
    ("wait... what \u2026", "wait what"),
    ("3 km\u00b2 and a/b \u2013 dash \u2014 em", "3 km \u00b2 and a/b dash em"),
    ("Alan B. Miller, U.S. Army, St. John's", "alan b. miller u.s. army st. john 's"),
    ("Vitamin C. It is", "vitamin c it is"),
    ("runway 14L/32R, 1.8g, 10:30am, -25", "runway 14l/32r 1.8 g 10:30 am -25"),
    ("fast food,low-priced; 3.5-4 and 3/5 stars", "fast food,low-priced 3.5-4 and 3/5 stars"),
    ("cannot gonna wanna", "can not gon na wan na"),
    ("Rock 'n' Roll o'clock O'Neil Marc'Antonio", "rock 'n' roll o'clock o'neil marc antonio"),
    ("a &amp; b, AT&T, a@b.com, www.foo.com", "a & b at&t a@b.com www.foo.com"),
    ("Really?? what?It", "really ?? what?it"),
    ("under_score two__under", "under_score two __ under"),
])  # fmt: skip
def test_words(text, words):
    assert ptb_words(text) == words.split()


def test_texts_of_punctuation_alone():
    """The scripts split at blanks: a text without words has one, the empty word."""
    assert score(RougeL(), ["..."], [["..."]]) == 1.0
    assert score(RougeL(), ["...", "a"], [["a"], ["..."]]) == 0.0
