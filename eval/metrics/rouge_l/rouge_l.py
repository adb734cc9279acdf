"""`evaluate.load("eval/metrics/rouge_l")`: see darel_hf/nlg/evaluate_modules.py."""

from darel_hf.nlg.evaluate_modules import metric_module

ROUGEL = metric_module("rouge_l")
