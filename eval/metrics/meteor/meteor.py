"""`evaluate.load("eval/metrics/meteor")`: see darel_hf/nlg/evaluate_modules.py."""

from darel_hf.nlg.evaluate_modules import metric_module

METEOR = metric_module("meteor")
