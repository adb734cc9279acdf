"""METEOR by nltk and by Java, and where WordNet is found."""

import shutil
import sys
from pathlib import Path

import pytest
from texts import score

from darel_hf.nlg.metrics import (
    METEOR,
    JavaMETEOR,
    NLGMetrics,
    find_wordnet,
)

JARS = [Path("/usr/share/java/meteor-1.5.jar"), Path.home() / "meteor-1.5" / "meteor-1.5.jar"]


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    """Write a WordNet with one synset, `car` and `auto`, in the layout of Princeton's files."""
    folder = tmp_path_factory.mktemp("wordnet")
    for pos, name in {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}.items():
        (folder / f"{name}.exc").write_text("")
        data = "  1 WordNet 3.0 Copyright of this little file\n"
        index = ""
        if pos == "n":
            offset = len(data)
            data += f"{offset:08d} 06 n 02 car 0 auto 0 000 | a vehicle\n"
            index = "".join(f"{word} n 1 0 1 1 {offset:08d}  \n" for word in ("auto", "car"))
        (folder / f"data.{name}").write_text(data)
        (folder / f"index.{name}").write_text(index)
    return folder


def test_meteor_by_hand(wordnet):
    exact = METEOR(None)
    assert score(exact, ["the cat sat"], [["the cat sat"]]) == pytest.approx(1 - 0.5 / 27)  # one chunk of three words
    # Two chunks of two words: the penalty is 0.5; the better reference counts.
    assert score(exact, ["b a"], [["a b", "x"]]) == pytest.approx(0.5)
    # Precision 1, recall 1/2: F = 0.5 / (0.9 + 0.05); one chunk of one word costs half. The stems agree.
    assert score(exact, ["cats"], [["cat food"]]) == pytest.approx(0.5 * 0.5 / 0.95)
    assert score(exact, ["", "auto"], [["a", "b"], ["car"]]) == 0.0
    assert score(METEOR(str(wordnet)), ["auto"], [["car"]]) == pytest.approx(0.5)


def test_meteors_signature_says_what_it_matches(wordnet):
    def signature(where):
        return NLGMetrics(wordnet=where)(["auto"], [["car"]])["signatures"]["meteor"]

    assert "impl:nltk|match:exact,stem,wordnet3.0" in signature(wordnet)
    assert "impl:nltk|match:exact,stem|" in signature("none")


def test_wordnet_must_be_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"wordnet=.*no WordNet there"):
        find_wordnet(tmp_path)
    monkeypatch.setattr("darel_hf.nlg.metrics.meteor.DEBIAN_WORDNET", str(tmp_path))
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    scores = NLGMetrics()(["a b"], [["a b"]])
    assert scores["meteor"] is None and "nltk.downloader wordnet" in scores["notes"][0]
    assert scores["ter"] == 0.0


def test_a_download_that_fails_leaves_the_word_to_us(tmp_path, monkeypatch, capsys):
    def download(name, quiet=False, print_error_to=sys.stderr):  # as nltk's, where there is no network
        print(f"Error loading {name}", file=print_error_to)
        return False

    monkeypatch.setattr("nltk.download", download)
    monkeypatch.setattr("darel_hf.nlg.metrics.meteor.DEBIAN_WORDNET", str(tmp_path))
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert find_wordnet() is None
    assert not capsys.readouterr().err


def test_damaged_wordnet(tmp_path):
    for name in ("data.noun", "index.noun", "data.adj"):
        (tmp_path / name).write_text("garbage\n")
    with pytest.raises(ValueError, match=r"wordnet=.*cannot be read"):
        NLGMetrics(wordnet=tmp_path)


def test_wordnet_unpacked_in_nltks_data(wordnet, tmp_path, monkeypatch):
    shutil.copytree(wordnet, tmp_path / "corpora" / "wordnet")
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    assert find_wordnet() == find_wordnet("nltk") == "nltk"


def test_debians_layout_has_no_list_of_names(wordnet):
    assert not (wordnet / "lexnames").exists()
    assert find_wordnet(wordnet) == str(wordnet)


@pytest.mark.skipif(
    not (shutil.which("java") and any(path.exists() for path in JARS)), reason="needs Java and meteor-1.5.jar"
)
def test_meteor_by_java():
    jar = next(path for path in JARS if path.exists())
    whole = score(JavaMETEOR(jar), ["the cat sat on the mat"], [["the cat sat on the mat"]])
    assert whole == 1.0


@pytest.mark.parametrize("answer", ["", "oops", "1 2 3"])
def test_a_jar_that_is_no_meteor(tmp_path, monkeypatch, answer):
    """A program that answers anything else is found out before anything is scored."""
    (tmp_path / "java").write_text(f"#!/bin/sh\nwhile read line; do echo '{answer}'; done\n")
    (tmp_path / "java").chmod(0o755)
    (tmp_path / "m.jar").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ValueError, match=r"meteor_jar=.*(no answer|not Meteor)"):
        NLGMetrics(meteor_jar=tmp_path / "m.jar")


def test_a_missing_jar_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"meteor_jar=.*no such file"):
        NLGMetrics(meteor_jar=tmp_path / "meteor-1.5.jar")
    with pytest.raises(ValueError, match="paper protocol"):
        NLGMetrics("paper", meteor_jar=tmp_path / "meteor-1.5.jar")
