"""BLEU, TER, METEOR, NIST and ROUGE-L of generated text: one file each, and `suite.py`, which puts them together."""

from .base import ptb_words
from .meteor import METEOR, JavaMETEOR, find_wordnet, open_wordnet
from .nist import NIST
from .rouge import RougeL, lcs_length
from .suite import NAMES, PROTOCOLS, NLGMetrics, paired_p_value, score_table
from .ter import FastTER
