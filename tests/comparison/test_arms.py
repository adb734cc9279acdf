"""Arms as they are typed, and what each does to a recipe."""

import pytest

from darel_hf.comparison import ARMS, parse_arms, parse_setting, settings_of

RECIPE = {
    "model": "tiny",
    "num_train_epochs": 5,
    "warmup_steps": 0.06,
    "seed": 3,
    "output_dir": "outputs/x",
    "online_keep": 0.3,
    "online_rule": "hardest",
    "rescore_every": 3,
    "group_column": "mr",
}


def test_every_arm_on_a_recipe():
    made = settings_of(list(ARMS), RECIPE, 0.4)
    plain = {"model": "tiny", "num_train_epochs": 5, "warmup_steps": 0.06}
    assert made["plain"] == plain
    assert made["fewer_epochs"] == {**plain, "num_train_epochs": 2.0}
    assert made["random"] == {**plain, "online_keep": 0.4, "online_rule": "random"}
    assert made["fast"] == {**plain, "fast": True}
    assert made["darel"] == {**plain, "online_rule": "hardest", "group_column": "mr", "budget_time": 0.4}
    assert made["recipe"] == {key: value for key, value in RECIPE.items() if key not in ("seed", "output_dir")}


def test_fewer_epochs_of_other_lengths():
    assert settings_of(["plain", "fewer_epochs"], {}, 0.5)["fewer_epochs"] == {"num_train_epochs": 1.5}
    steps = {"max_steps": 101, "warmup_steps": 10}
    assert settings_of(["plain", "fewer_epochs"], steps, 0.5)["fewer_epochs"] == {"max_steps": 50, "warmup_steps": 5}


def test_arms_as_typed(tmp_path):
    (tmp_path / "arms.yaml").write_text("slow: {learning_rate: 1.0e-4}\ndarel:\n")
    typed = ["plain,half:online_keep=0.5,online_rule=random,fast", f"{tmp_path}/arms.yaml", "x:lora_r=4,arm=recipe"]
    arms = parse_arms(typed)
    assert list(arms) == ["plain", "half", "fast", "slow", "darel", "x"]
    made = settings_of(arms, RECIPE, 0.5)
    assert made["half"] == {**made["plain"], "online_keep": 0.5, "online_rule": "random"}
    assert made["slow"] == {**made["plain"], "learning_rate": 1e-4}
    whole = {key: value for key, value in RECIPE.items() if key not in ("seed", "output_dir")}
    assert made["x"] == {**whole, "lora_r": 4}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=0.5", 0.5),
        ("a=no", "no"),
        ("a=5e-4", 5e-4),
        ("a=true", True),
        ("a=[x, y]", ["x", "y"]),
        ("a=b=c", "b=c"),
    ],
)
def test_settings_as_typed(text, value):
    assert parse_setting(text) == ("a", value)


@pytest.mark.parametrize(
    ("arms", "match"),
    [
        (["plain"], "give two or more"),
        (["plain", "plain"], "twice"),
        (["plain", "fewer_epoch"], "unknown; did you mean fewer_epochs"),
        (["plain", "../x"], "at most 15"),
        ({"plain": None, "a": {"online_keep": 5}}, r"arms='a': online_keep=5.*5 per cent is 0.05"),
        ({"plain": None, "a": {"seed": 5}}, "the comparison sets this"),
        ({"plain": None, "a": {"arm": "dare"}}, "did you mean darel"),
    ],
)
def test_wrong_arms(arms, match):
    with pytest.raises(ValueError, match=match):
        settings_of(arms, RECIPE, 0.5)


@pytest.mark.parametrize("budget", [0, 1.5, "half", True])
def test_wrong_budgets(budget):
    with pytest.raises(ValueError, match="budget"):
        settings_of(["plain", "random"], RECIPE, budget)


@pytest.mark.parametrize("text", ["a,b=1", "x:y", "a=1", "none.yaml", "a,a"])
def test_wrong_words(text):
    with pytest.raises(ValueError, match="arms="):
        parse_arms([text])
