"""Fingerprints follow content, state and code."""

import datasets
import numpy as np
import torch
from helpers import PadCollator, token_data

from darel_hf.data import (
    code_fingerprint,
    data_fingerprint,
)


def test_fingerprints_follow_the_content(tmp_path):
    rows, ids = token_data(20), np.arange(20)
    base = data_fingerprint(rows, ids)
    shuffled = rows.select(list(range(19, -1, -1))).select(list(range(19, -1, -1)))
    rows.save_to_disk(str(tmp_path / "saved"))
    for same in (shuffled, datasets.load_from_disk(str(tmp_path / "saved")), rows.map(lambda row: row)):
        assert data_fingerprint(same, ids) == base
    other = rows.map(lambda row, i: {"group": 99 if i == 19 else row["group"]}, with_indices=True)
    assert data_fingerprint(other, ids) != base
    assert data_fingerprint(rows, ids + 1) != base
    assert data_fingerprint(rows.select(list(range(19, -1, -1))), ids) != base
    listed = [{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([3.0, 4.0])}]
    assert data_fingerprint(listed, ids[:2]) == data_fingerprint([dict(item) for item in listed], ids[:2])
    assert data_fingerprint(listed, ids[:2]) != data_fingerprint(listed[::-1], ids[:2])


def test_code_fingerprints_follow_state_and_code():
    assert code_fingerprint(PadCollator(8)) == code_fingerprint(PadCollator(8))
    assert code_fingerprint(PadCollator(8)) != code_fingerprint(PadCollator(4))
    assert code_fingerprint(lambda x: x + 1) != code_fingerprint(lambda x: x + 2)
