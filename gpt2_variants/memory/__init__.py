"""What a training step takes of a GPU's memory, estimated without a GPU; and whether a run fits the card at hand."""

from .fit import Verdict as Verdict
from .fit import verdict as verdict
from .meter import NoEstimate as NoEstimate
from .meter import Step as Step
from .meter import faked_step as faked_step
from .meter import kept_bytes as kept_bytes
from .micro_batch import with_fitting_micro_batch as with_fitting_micro_batch
from .peak import GIB as GIB
from .peak import Card as Card
from .peak import Demand as Demand
from .peak import card as card
from .states import Sharding as Sharding
from .states import States as States
from .states import model_states as model_states
