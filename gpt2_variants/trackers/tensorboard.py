"""TensorBoard: event files in the run's folder, by torch's own writer."""

import json
from pathlib import Path
from typing import Any

from .tracker import TrackedRun, tagged


class TensorBoardTracker:
    """TensorBoard: `tensorboard/` in the run's folder, a file of events for each time the run was started.

    Args:
        folder: of the run.
        config: shown as text, once: where an earlier start has left a file, it stands there.
        resume_step: TensorBoard drops what was logged of later steps.
    """

    def __init__(self, folder: Path, config: dict[str, Any], resume_step: int):
        from torch.utils.tensorboard import SummaryWriter

        place = folder / "tensorboard"
        first = not any(place.glob("events.out.tfevents.*"))
        # also at step 0: a run that died before its first checkpoint begins anew
        self._writer: Any = SummaryWriter(str(place), purge_step=resume_step + 1)
        self._last_step: dict[str, int] = {}
        if first:
            indented = json.dumps(config, indent=2, default=str).replace("\n", "\n    ")
            self._writer.add_text("config", f"    {indented}", global_step=0)  # Markdown's code
            self._writer.flush()

    def log(self, record: dict[str, Any]) -> None:
        """Add the numbers as `train/...` and `eval/...` at "step"; what is None is left out, NaN and infinity are not.

        A tag has one value a step: the time of an evaluation stands with the training record of its step already.
        """
        for tag, value in tagged(record).items():
            if value is not None and self._last_step.get(tag) != record["step"]:
                self._last_step[tag] = record["step"]
                self._writer.add_scalar(tag, value, global_step=record["step"])
        # by itself the writer keeps two minutes back, which a killed process would lose: steps before its checkpoint
        self._writer.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        self._writer.close()


def open_tensorboard(run: TrackedRun) -> TensorBoardTracker:
    """Return the tracker of `run`."""
    return TensorBoardTracker(run.folder, run.facts, run.resume_step)
