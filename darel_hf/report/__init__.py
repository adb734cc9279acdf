"""
What was planned, kept, dropped and measured: as an object, as files, as a page.

Stands on `budget/` and `selection/`.
"""

from .charts import chart, figure_at
from .environment import describe
from .html import STYLE, write_html
from .report import DROPPED, KEPT, Report, scoring_seconds
