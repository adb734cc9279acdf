"""What a path or a download could do to a user: nothing is unpickled, no remote code is trusted."""

import ast
from pathlib import Path

import numpy as np
import pytest

import darel_hf
from darel_hf.scoring.dataset import _read_part

ROOT = Path(darel_hf.__file__).parents[1]
FILES = sorted([*(ROOT / "darel_hf").rglob("*.py"), *(ROOT / "recipes").rglob("*.py"), *(ROOT / "eval").rglob("*.py")])


def names(tree):
    """Yield dotted names of calls, and of what is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_unpickles_or_trusts(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    forbidden = {"pickle", "dill", "cloudpickle", "torch.load", "pickle.load", "pickle.loads", "eval", "exec"}
    assert not forbidden & set(names(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            assert isinstance(node.value, ast.Constant) and node.value.value is False


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_part_of_scores_is_data_only(tmp_path, caplog):
    part, mark = tmp_path / "rank0of1-0.npy", tmp_path / "exploded"
    np.save(part, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    assert _read_part(part) is None
    assert "cannot be read" in caplog.text
    assert not mark.exists()
