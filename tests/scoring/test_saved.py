"""Scores in files, and the fingerprint of what made them."""

import numpy as np
import pytest
import torch
from helpers import tiny_gpt2, tiny_lora
from models import score

from darel_hf.scoring import (
    load_scores,
    match_scores,
    model_fingerprint,
    save_scores,
)
from darel_hf.selection import Scores


def test_saved_scores(tmp_path):
    scores = score(ids=np.arange(50) * 2)
    scores = Scores(scores.ids, scores.losses, scores.n_tokens, scores.correct, {"data": "abc"})
    save_scores(scores, tmp_path / "s.parquet")
    loaded = load_scores(tmp_path / "s.parquet")
    matched = match_scores(loaded, np.array([8, 2]), "abc", "s.parquet")
    np.testing.assert_array_equal(matched.losses, scores.losses[[4, 1]])
    with pytest.raises(ValueError, match="made from other data"):
        match_scores(loaded, np.array([2]), "xyz", "s.parquet")
    with pytest.raises(ValueError, match=r"no score for 1 of 2 samples, ids \[3\]"):
        match_scores(loaded, np.array([2, 3]), "abc", "s.parquet")


def test_unreadable_scores(tmp_path):
    with pytest.raises(ValueError, match="darel score"):
        load_scores(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match="not a readable parquet"):
        load_scores(tmp_path / "bad.parquet")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"sample_id": [1]}), tmp_path / "no_loss.parquet")
    with pytest.raises(ValueError, match="'loss' is missing"):
        load_scores(tmp_path / "no_loss.parquet")
    pq.write_table(pa.table({"sample_id": [1, 2], "loss": [1.0, float("nan")]}), tmp_path / "nan.parquet")
    with pytest.raises(ValueError, match=r"sample ids \[2\]"):
        load_scores(tmp_path / "nan.parquet")


def test_model_fingerprints():
    one, same, other = tiny_gpt2(), tiny_gpt2(), tiny_gpt2(seed=1)
    assert model_fingerprint(one) == model_fingerprint(same) != model_fingerprint(other)
    with torch.no_grad():
        same.transformer.h[1].mlp.c_fc.weight[0, 0] += 1e-6
    assert model_fingerprint(one) != model_fingerprint(same)
    left, right = tiny_lora(), tiny_lora()
    with torch.no_grad():
        for name, parameter in right.named_parameters():
            if "lora_A" in name:
                parameter.add_(1)
    assert model_fingerprint(left) != model_fingerprint(right)
    assert model_fingerprint(left, without_adapters=True) == model_fingerprint(right, without_adapters=True)
