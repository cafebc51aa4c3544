"""How far the runs of an experiment have come, read from their folders."""

import json
from pathlib import Path

from ..config.plan import Plan, as_dict, recipe
from ..config.recovered import facts_of_run
from ..config.saved_plan import saved_plan
from ..faults import UsageError
from ..records import read_facts
from ..report.runs import SavedRun, read_run

FINISHED, DIVERGED, OPEN = "finished", "diverged", "open"


def state(folder: Path) -> str:
    """Return whether the run in `folder` is finished, has diverged (its loss was not finite), or is to be run."""
    try:
        facts = read_facts(folder)
    except (OSError, ValueError):
        return OPEN
    if facts.get("status") == "finished":
        return FINISHED
    return DIVERGED if facts.get("not_finite_at") is not None else OPEN


def finished_run(folder: Path) -> SavedRun | None:
    """Return the run in `folder`, if it is finished."""
    return read_run(folder) if state(folder) == FINISHED else None


def differences(folder: Path, plan: Plan) -> list[str]:
    """Return where the run in `folder` differs from `plan`, as "name old, not new"; empty where there is no run."""
    try:
        facts = facts_of_run(folder).facts
    except ValueError as err:
        raise UsageError([str(err)]) from err
    if not facts:
        return []
    then, now = (recipe(p) for p in (saved_plan(folder, facts), json.loads(json.dumps(as_dict(plan)))))
    return [
        f"{name} {json.dumps(then.get(name))}, not {json.dumps(now.get(name))}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]
