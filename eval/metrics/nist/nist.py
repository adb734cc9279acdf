"""`evaluate.load("eval/metrics/nist")`: see darel_hf/nlg/evaluate_modules.py."""

from darel_hf.nlg.evaluate_modules import metric_module

NIST = metric_module("nist")
