"""The house: who names what, what an import costs, and that facts and registries agree."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

import darel_hf
from darel_hf.config import ACCELERATOR_FACTS, RULE_FACTS

PACKAGE = Path(darel_hf.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
OUTSIDE = [path for path in FILES if path.parent.name != "accelerators"]


def conditions(tree):
    """Yield all that decides a branch."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.Match):
            yield from (case.pattern for case in node.cases)


def words(tree):
    """Yield names and texts."""
    for node in ast.walk(tree):
        for value in (getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "value", None)):
            if isinstance(value, str):
                yield value


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_branch_names_an_accelerator(path):
    found = {word for test in conditions(ast.parse(path.read_text(encoding="utf-8"))) for word in words(test)}
    named = {*ACCELERATOR_FACTS, *(facts.setting for facts in ACCELERATOR_FACTS.values()), "padding_free"}
    assert not found & named


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name == "__init__.py"], ids=lambda path: path.parent.name
)
def test_every_wing_says_what_it_is_for(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text
    if path.parent.parent == PACKAGE:
        assert "\nStands on " in text


def test_an_installed_package_has_its_data_files():
    settings = configparser.ConfigParser()
    settings.read(PACKAGE.parent / "setup.cfg")
    told = settings["options.package_data"]["darel_hf"].split()
    for path in PACKAGE.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            assert any(path.relative_to(PACKAGE).match(pattern) for pattern in told), path


def in_a_new_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_settings_know_the_rules_and_accelerators_there_are():
    code = (
        "from darel_hf.config import ACCELERATOR_FACTS, RULE_FACTS;"
        "before = list(ACCELERATOR_FACTS), list(RULE_FACTS);"
        "from darel_hf.selection import RULES; from darel_hf.accelerators import ACCELERATORS;"
        "assert sorted(RULES) == sorted(before[1]) and sorted(ACCELERATORS) == sorted(before[0]);"
        "assert all((RULE_FACTS[n].weighs, RULE_FACTS[n].needs) == (r.weigh is not None, r.needs)"
        " for n, r in RULES.items());"
        "print(len(before[1]))"
    )
    assert int(in_a_new_process(code)) >= len([name for name in RULE_FACTS if not name.startswith("test_")])


@pytest.mark.parametrize("what", ["import darel_hf", "from darel_hf import DarelConfig", "from darel_hf import Plan"])
def test_light_imports(what):
    heavy = "{'torch', 'transformers', 'torchvision', 'trl', 'matplotlib', 'nltk', 'datasets'}"
    assert in_a_new_process(f"{what}; import sys; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_the_trainer_needs_no_extras():
    heavy = "{'trl', 'matplotlib', 'nltk'}"  # transformers itself imports torchvision where it is installed
    code = f"from darel_hf import DarelTrainer; import sys; print(sorted({heavy} & set(sys.modules)))"
    assert in_a_new_process(code).strip() == "[]"
