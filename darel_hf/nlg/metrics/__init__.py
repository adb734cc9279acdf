"""Scores of generated text: one file each, and `suite.py`, which puts them together."""

from .cider import CIDEr
from .formats import FORMATS, score_table, shown
from .meteor import METEOR, JavaMETEOR, find_wordnet, open_wordnet
from .nist import NIST
from .ptb import ptb_words
from .rouge import RougeL, lcs_length
from .significance import holm, paired_p_value, randomization_p_value
from .slots import SlotError, SlotErrorRate
from .suite import NAMES, PROTOCOLS, Evaluation, NLGMetrics, check_texts
from .ter import FastTER
