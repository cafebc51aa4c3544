"""Weights & Biases: online where it can be, else offline, and never a prompt."""

import functools
import netrc
import os
import random
import shlex
import sys
import urllib.parse
from pathlib import Path
from typing import Any

from .. import network
from .tracker import TrackedRun, tagged

WANDB_MODES = ("online", "offline", "disabled", "shared")


def wandb_mode() -> tuple[str, str]:
    """W&B's mode and the reason for it: $WANDB_MODE; else online with an API key and a server that answers.

    Left to itself, W&B would ask for a key on a terminal, hanging the ranks, or wait 36 s for a server that is gone.
    """
    if asked := os.environ.get("WANDB_MODE"):
        return asked, f"WANDB_MODE is {asked}"
    if not wandb_has_key():
        return "offline", "there is no API key"
    if not network.answers(wandb_server()):
        return "offline", f"{wandb_server()} cannot be reached"
    return "online", "there is an API key"


def wandb_fault() -> str | None:
    """Return in a line why W&B cannot do what $WANDB_MODE asks for; None where it can or where nothing is asked for."""
    asked = os.environ.get("WANDB_MODE")
    if asked and asked not in WANDB_MODES:
        return f"WANDB_MODE={asked}: one of {', '.join(WANDB_MODES)} is allowed"
    if asked != "online":
        return None
    if not wandb_has_key():
        return "WANDB_MODE=online: there is no API key; set WANDB_API_KEY or run `wandb login`, or WANDB_MODE=offline"
    if not network.answers(wandb_server()):
        return (
            f"WANDB_MODE=online: {wandb_server()} cannot be reached; WANDB_MODE=offline keeps the run to upload later"
        )
    return None


def wandb_server() -> str:
    """Return its address: $WANDB_BASE_URL, else the public one."""
    return os.environ.get("WANDB_BASE_URL", "").rstrip("/") or "https://api.wandb.ai"


def wandb_has_key() -> bool:
    """Return whether an API key is in the environment or, as `wandb login` leaves it, in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return known.authenticators(urllib.parse.urlsplit(wandb_server()).hostname or "") is not None


class WandbTracker:
    """Weights & Biases. What cannot go online is kept offline, and it is said why and how to upload it. Never a prompt.

    Args:
        folder: of the run; W&B's files go to `wandb/` in it.
        name, group, config: what W&B shows.
        run_id: of W&B's run; one that exists is gone on with.

    Raises:
        wandb.Error: W&B refuses, where $WANDB_MODE asks for more than offline.
    """

    def __init__(self, folder: Path, name: str, group: str, config: dict[str, Any], run_id: str):
        import wandb

        mode: Any
        mode, reason = wandb_mode()
        start = functools.partial(
            wandb.init,
            project=os.environ.get("WANDB_PROJECT") or "gpt2_variants",
            dir=str(folder),
            name=name,
            group=group,
            config=config,
            id=run_id,
            resume="allow",
            settings=wandb.Settings(init_timeout=30, silent=True),
        )
        try:
            self._run = start(mode=mode)
        except wandb.Error as err:
            if os.environ.get("WANDB_MODE"):
                raise
            mode, reason = "offline", " ".join(str(err).split())[:200]
            wandb.teardown()
            self._run = start(mode=mode)
        self._run.define_metric("*", step_metric="step")
        self._sync_line = f"wandb sync {shlex.quote(str(folder))}/wandb/offline-*" if mode == "offline" else None
        self.url: str | None = self._run.url if mode == "online" else None  # where the run can be seen
        if self.url:
            print(f"W&B: {self.url}", file=sys.stderr)
        elif self._sync_line:
            print(f"W&B: offline ({reason}); to upload it later: {self._sync_line}", file=sys.stderr)

    def log(self, record: dict[str, Any]) -> None:
        """Log as `train/...` and `eval/...` against "step"."""
        self._run.log({"step": record["step"], **tagged(record)})

    def close(self) -> None:
        """Finish the W&B run; on return all of it is on disk (offline) or uploaded."""
        import wandb

        self._run.finish()
        # finish() only tells W&B's service process to close the run's file; teardown() waits until it has
        wandb.teardown()
        if self._sync_line:
            print(f"W&B: kept offline; to upload it: {self._sync_line}", file=sys.stderr)


def open_wandb(run: TrackedRun) -> WandbTracker:
    """Return the tracker of `run`, in the W&B run that its earlier starts have logged to, whose id `run.json` keeps."""
    new_id = f"{run.facts['variant']}-{random.SystemRandom().getrandbits(40):010x}"
    run_id = run.facts.get("wandb_run_id", new_id)
    run.remember(wandb_run_id=run_id)
    tracker = WandbTracker(run.folder, run.name, run.group, run.facts, run_id)
    if tracker.url:
        run.remember(wandb_url=tracker.url)
    return tracker
