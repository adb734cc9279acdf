"""`evaluate.load("eval/metrics/cider")`: see darel_hf/nlg/evaluate_modules.py."""

from darel_hf.nlg.evaluate_modules import metric_module

CIDER = metric_module("cider")
