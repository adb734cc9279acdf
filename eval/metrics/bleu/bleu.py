"""`evaluate.load("eval/metrics/bleu")`: see darel_hf/nlg/evaluate_modules.py."""

from darel_hf.nlg.evaluate_modules import metric_module

BLEU = metric_module("bleu")
