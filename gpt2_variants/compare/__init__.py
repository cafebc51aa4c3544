"""An experiment: variants trained over the same seeds, each at the rate that suits it, and the report on them."""

from .experiment import Entry as Entry
from .experiment import Experiment as Experiment
from .session import compare as compare
