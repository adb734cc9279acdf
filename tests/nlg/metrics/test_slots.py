"""Slot errors: texts made up for each kind, and rules of one's own."""

import random
import re
from pathlib import Path

import pytest

from darel_hf.nlg.metrics import NLGMetrics, SlotErrorRate
from darel_hf.nlg.metrics.slots import E2E_RULES, load_rules
from darel_hf.nlg.representations import parse

MR = (
    "name[The Plough], eatType[pub], food[French], priceRange[less than £20], customer rating[3 out of 5], "
    "area[riverside], familyFriendly[no], near[Café Rouge]"
)
RIGHT = (
    "The Plough is a cheap French pub by the river, near Café Rouge. It has an average rating and is not "
    "family-friendly."
)


def errors(text, mr=MR, *others):
    metric = SlotErrorRate()
    metric.learn([mr, *others])
    return [str(error) for error in metric.errors(text, mr)[0]]


@pytest.mark.parametrize(("changed", "into", "expected"), [
    ("", "", []),
    ("The Plough", "Plough", []),
    ("cheap", "low-priced", []),
    ("by the river", "on the riverside", []),
    ("is not family-friendly", "does not welcome kids", []),
    ("is not family-friendly", "is for adults only", []),
    ("has an average rating", "is rated three stars", []),
    (" French", "", ["food[French] is missing"]),
    ("French", "Italian", ["food[French] is said as [Italian]"]),
    ("French", "French and Italian", ["food[Italian] is added"]),
    ("is not family-friendly", "is family-friendly", ["familyFriendly[no] is said as [yes]"]),
    ("by the river, ", "", ["area[riverside] is missing"]),
    ("The Plough", "It", ["name[The Plough] is missing"]),
    ("near Café Rouge", "nearby", ["near[Café Rouge] is missing"]),
    ("cheap", "expensive", ["priceRange[less than £20] is said as [more than £30]"]),
    ("3 out", "", []),
])  # fmt: skip
def test_kinds_of_errors(changed, into, expected):
    assert errors(RIGHT.replace(changed, into)) == expected


def test_what_is_added():
    assert errors("The Plough is a pub.", "name[The Plough]") == ["eatType[pub] is added"]
    assert errors("Near Café Rouge is The Plough.", "name[The Plough]", MR) == ["near[Café Rouge] is added"]
    # A café's name says nothing of the kind of place, and nothing is added twice.
    assert errors("The Plough is near Café Rouge.", "name[The Plough], near[Café Rouge]") == []


def test_the_rate():
    metric = SlotErrorRate()
    scores = NLGMetrics(only=["ser", "bleu"])(
        ["The Plough is a pub.", "Zizzi"],
        [["x"], ["y"]],
        mrs=["name[The Plough], food[French]", "name[Zizzi], eatType[pub]"],
    )
    assert scores["ser"] == pytest.approx(100 * 3 / 4)  # French missing, pub added; pub missing; of four values
    assert scores["signatures"]["ser"].startswith("nrefs:1|rules:slots_e2e-")
    assert metric._compute_score_from_stats([0, 0, 0, 0]).score == 0.0


def test_other_domains_are_looked_for_verbatim():
    mr = "genre[jazz], year[1959], live[yes]"
    assert errors("A jazz record of 1959.", mr) == []
    assert errors("A record of 1960.", mr, "year[1960]") == ["genre[jazz] is missing", "year[1959] is said as [1960]"]


def test_the_form_of_lora_and_other_names():
    mr = "name : The Plough | Type : pub | price : cheap"
    assert parse(mr) == [("name", "The Plough"), ("Type", "pub"), ("price", "cheap")]
    assert errors("The Plough is an inexpensive pub.", mr) == []
    assert errors("The Plough is an inexpensive place.", mr) == ["eatType[pub] is missing"]


@pytest.mark.parametrize("text", [
    "[INST] Hi [/INST]", "Sort the list [3, 1, 2].", "name[a], then", "", "plain", "a | b : c", "name[a[b]]",
    "Inn : is : cheap | Inn : at : river",
])  # fmt: skip
def test_what_is_no_representation(text):
    assert parse(text) is None


def test_every_value_of_e2e_is_recognised_as_it_stands():
    rules = load_rules(E2E_RULES)
    for slot, values in rules.slots.items():
        for value in values or ():
            if slot != "familyFriendly":
                said = (
                    f"It is {value} rating" if slot == "customer rating" and "out" not in value else f"It is {value}."
                )
                said = said.replace("high.", "high price.") if slot == "priceRange" else said
                found = errors(said, f"{slot}[{value}]")
                assert found == [], (slot, value, said, found)


SAID = {
    "eatType": {"pub": "a pub", "restaurant": "a restaurant", "coffee shop": "a coffee shop"},
    "food": {
        "Italian": "the food is Italian",
        "Fast food": "they sell fast food",
        "English": "you get British dishes",
    },
    "area": {"riverside": "it lies by the river", "city centre": "it is in the centre of the city"},
    "priceRange": {"more than £30": "meals cost more than £30", "less than £20": "you pay less than £20"},
    "customer rating": {"5 out of 5": "guests gave 5 out of 5", "1 out of 5": "guests gave 1 out of 5"},
    "familyFriendly": {"yes": "children are welcome", "no": "it is not for kids"},
    "near": {"Café Rouge": "next to Café Rouge", "Burger King": "next to Burger King"},
}


def test_errors_are_those_that_were_put_in():
    """Texts made from a plan of what is left out, said otherwise and added: the errors found are the plan's."""
    draw = random.Random(0)
    values = [f"near[{value}]" for value in SAID["near"]]  # what the representations of a file have
    for _ in range(300):
        wanted, parts, planned = ["name[The Mill]"], ["The Mill"], []
        for slot, ways in draw.sample(list(SAID.items()), len(SAID)):
            value, other = draw.sample(list(ways), 2)
            kind = draw.choice(["right", "right", "missing", "wrong", "added", "nothing"])
            if kind not in ("added", "nothing"):
                wanted.append(f"{slot}[{value}]")
            if kind in ("right", "added"):
                parts.append(ways[value])
            if kind == "wrong":
                parts.append(ways[other])
            planned += {
                "missing": [f"{slot}[{value}] is missing"],
                "wrong": [f"{slot}[{value}] is said as [{other}]"],
                "added": [f"{slot}[{value}] is added"],
            }.get(kind, [])
        assert sorted(errors(", ".join(parts) + ".", ", ".join(wanted), *values)) == sorted(planned)


def test_rules_of_ones_own(tmp_path):
    (tmp_path / "rules.yaml").write_text("slots:\n  mood:\n    good: ['happy|glad']\n    bad: ['sad']\n")
    scores = NLGMetrics(only=["ser", "bleu"], slot_rules=tmp_path / "rules.yaml")(
        ["so glad"], [["x"]], mrs=["mood[good]"]
    )
    assert scores["ser"] == 0.0 and "rules:rules-" in scores["signatures"]["ser"]
    for text, message in (
        ("", "needs `slots:`"),
        ("slots: [", "no YAML"),
        ("slots:\n  a: 3\n", "slot 'a' needs values"),
        ("slots:\n  a: {b: c}\n", "value 'b' needs a list of patterns"),
        ("slots:\n  a: {b: ['(']}\n", "has a pattern that is none"),
    ):
        (tmp_path / f"{len(text)}.yaml").write_text(text)
        with pytest.raises(ValueError, match=re.escape(message)):
            SlotErrorRate(tmp_path / f"{len(text)}.yaml")
    with pytest.raises(ValueError, match="no such file"):
        SlotErrorRate(tmp_path / "none.yaml")


DATA = Path(__file__).parents[4] / "shared" / "data" / "e2e_nlg" / "devset.csv"


@pytest.mark.skipif(not DATA.exists(), reason="needs the E2E development set")
def test_human_references_make_few_errors_and_foreign_ones_many():
    """A second look: references say most values of their own representation, and few of another one."""
    from darel_hf.nlg.task import read_pairs

    pairs = random.Random(0).sample(read_pairs(DATA), 400)
    mrs, texts = [pair["mr"] for pair in pairs], [pair["ref"] for pair in pairs]
    rate = NLGMetrics(only=["ser", "bleu"], processes=1)
    own = rate(texts, [["x"]] * 400, mrs=mrs)["ser"]
    foreign = rate(texts[1:] + texts[:1], [["x"]] * 400, mrs=mrs)["ser"]
    assert own < 15 and foreign > 80
