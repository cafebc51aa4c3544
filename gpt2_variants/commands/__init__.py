"""The commands beside `train`, a file each. A file imports what is heavy where its command runs, not at its top."""

from . import check, compare, data, evaluate, export, generate, list_variants, prepare, push, report
from .command import Command as Command

# In the order of the help.
FILES = (list_variants, compare, check, generate, evaluate, export, prepare, data, push, report)
COMMANDS: dict[str, Command] = {file.COMMAND.name: file.COMMAND for file in FILES}
