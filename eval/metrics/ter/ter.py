"""`evaluate.load("eval/metrics/ter")`: see darel_hf/nlg/evaluate_modules.py."""

from darel_hf.nlg.evaluate_modules import metric_module

TER = metric_module("ter")
