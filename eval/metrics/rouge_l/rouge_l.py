"""`evaluate.load("eval/metrics/rouge_l")`: see darel_hf/evaluate_modules.py."""

from darel_hf.evaluate_modules import metric_module

ROUGEL = metric_module("rouge_l")
