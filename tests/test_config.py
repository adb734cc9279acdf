"""`DarelConfig`: defaults that change nothing, and one clear error for each bad value."""

import dataclasses
import json

import pytest
from transformers import HfArgumentParser

from darel_hf import DarelConfig


def test_defaults_are_off():
    assert not DarelConfig().active


@pytest.mark.parametrize(
    "settings",
    [{"offline_keep": 0.5, "offline_rule": "middle"}, {"online_keep": 0.5}, {"budget_time": 0.5}, {"track": True}],
)
def test_anything_else_is_on(settings):
    assert DarelConfig(**settings).active


@pytest.mark.parametrize("field", ["offline_keep", "online_keep", "budget_time", "budget_memory"])
@pytest.mark.parametrize("value", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_fractions_out_of_range(field, value):
    with pytest.raises(ValueError, match=rf"{field}=.*fraction in \(0, 1\]"):
        DarelConfig(**{field: value})


def test_a_percentage_is_explained():
    with pytest.raises(ValueError, match=r"80 per cent is 0\.8"):
        DarelConfig(offline_keep=80)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"offline_keep": "0.5"}, TypeError, "offline_keep='0.5'"),
        ({"online_keep": True}, TypeError, "online_keep=True"),
        ({"rescore_every": 0}, ValueError, "rescore_every=0"),
        ({"rescore_every": 1.5}, TypeError, "rescore_every=1.5"),
        ({"offline_rule": "hardness"}, ValueError, "unknown rule; choose one of .*hardest"),
        ({"online_rule": ""}, ValueError, "online_rule=''"),
        ({"budget_method": "guess"}, ValueError, "budget_method='guess'"),
        ({"online_backward": "half"}, ValueError, "online_backward='half': choose one of"),
        ({"online_backward": "sliced"}, ValueError, "'random' reads no losses, .*choose another online_rule"),
        (
            {"online_backward": "sliced", "online_rule": "hardest", "budget_memory": 0.5},
            ValueError,
            "'sliced': memory is",
        ),
        ({"online_rule": "rho_loss"}, ValueError, "online_rule='rho_loss': .*give reference_scores"),
        ({"offline_rule": ["hardest"]}, ValueError, "offline_rule=.*unknown rule"),
        ({"unpad": "no"}, TypeError, "unpad='no': give True or False"),
        ({"length_correction": 0}, TypeError, "length_correction=0: give True or False"),
        ({"finish_epochs": float("inf")}, ValueError, "finish_epochs=inf: give a number of epochs"),
        ({"scores": 5}, TypeError, "scores=5: give a path"),
        ({"scores": "a.parquet"}, ValueError, "scores='a.parquet': no rule reads them; .*offline_rule='middle'"),
        ({"group_column": 4}, TypeError, "group_column=4: give the name of a column"),
        ({"budget_time": 0.5, "offline_keep": 0.8, "offline_rule": "middle"}, ValueError, "a budget derives this"),
        ({"budget_memory": 0.5, "rescore_every": 2}, ValueError, "a budget derives this"),
    ],
)
def test_bad_settings(settings, error, match):
    with pytest.raises(error, match=match):
        DarelConfig(**settings)


def test_paths_are_kept_as_text(tmp_path):
    """Settings are saved as JSON, in checkpoints and reports."""
    assert json.loads(json.dumps(DarelConfig(scores=tmp_path, offline_rule="middle").to_dict()))["scores"] == str(
        tmp_path
    )


def test_composes_with_the_argument_parser():
    (config,) = HfArgumentParser(DarelConfig).parse_args_into_dataclasses(
        ["--offline_keep", "0.7", "--track", "true", "--length_correction", "false", "--rescore_every", "3"]
    )
    assert config == DarelConfig(offline_keep=0.7, track=True, length_correction=False, rescore_every=3)


def test_every_field_has_a_help_text():
    assert all("help" in field.metadata for field in dataclasses.fields(DarelConfig))
