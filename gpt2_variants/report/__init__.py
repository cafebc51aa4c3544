"""What runs say of themselves when they are over: figures, curves, pictures, and which architecture is better.

One run gives a summary and a sample; one or more give a page, `report.html`, and a table, `report.md`.
"""

from .closing import plot, sample, show, summary
from .differences import judge
from .groups import make_groups
from .page import write
from .runs import AXES, read_run
from .sections import Figure, Section
from .tables import Table
from .verdict import verdict_said

__all__ = [
    "AXES",
    "Figure",
    "Section",
    "Table",
    "judge",
    "make_groups",
    "plot",
    "read_run",
    "sample",
    "show",
    "summary",
    "verdict_said",
    "write",
]
