"""
Is it worth it on your data? Arms of one training, each with several seeds, and what can be told apart.

Stands on `report/`, and on `config.py` and `files.py`: what trains is started by name, in processes.
"""

from .arms import ARMS, parse_arms, parse_setting, settings_of
from .compare import compare, compare_recipe
from .result import Comparison, Row
from .runs import Run
