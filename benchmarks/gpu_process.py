"""A process that carries out items of a stage, so that one that hangs or dies takes no other with it.

python benchmarks/gpu_process.py STAGE SCALE    # reads items' names from stdin, a line each; answers in JSON
"""

import contextlib
import gc
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from gpu_items import Day, Skipped
from results_page import ROOT

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
}
LINES = 40  # of a traceback that are kept


def answer_to(stage: str, day: Day, name: str) -> dict[str, Any]:
    """Return what came of an item: `status` (done, failed or skipped), `why`, `rows`, and a failed one's `trace`."""
    from gpu_stages import stages

    item = {item.name: item for item in stages(day)[stage].items(day)}[name]
    try:
        rows = item.run(day)
    except Skipped as err:
        return {"status": "skipped", "why": str(err), "rows": []}
    except Exception as err:
        said = (str(err).strip().splitlines() or [""])[0]
        trace = traceback.format_exc().splitlines()[-LINES:]
        return {"status": "failed", "why": f"{type(err).__name__}: {said[:400]}", "rows": [], "trace": trace}
    if wrong := [str(row["what"]) for row in rows if row.get("ok") is False]:
        return {"status": "failed", "why": f"not as it should be: {'; '.join(wrong)}", "rows": rows}
    return {"status": "done", "rows": rows}


def serve(stage: str, day: Day) -> None:
    """Answer the items whose names come in. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        answer = answer_to(stage, day, json.loads(line))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class StageProcess:
    """A process for items of a stage, with the processes that it starts itself in its group."""

    program = __file__

    def __init__(self, stage: str, day: Day, log: Path):
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, self.program, stage, json.dumps(vars(day))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, **OFFLINE, "PYTHONPATH": path},
                start_new_session=True,
            )

    def ask(self, name: str, seconds: float) -> dict[str, Any]:
        """Do what `answer_to` does; where no answer comes within `seconds`, end this process and return a failure."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(name) + "\n")
            self._process.stdin.flush()
        except OSError:
            return self._died()
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            said = self._said()
            self.close()
            why = f"no answer within {seconds:.0f} s"
            return {"status": "failed", "why": why, "rows": [], "trace": said, "timed_out": True}
        line = self._process.stdout.readline()
        return json.loads(line) if line else self._died()

    def _died(self) -> dict[str, Any]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20)  # it has closed its end, and may still be ending
        self.close()
        code = self._process.returncode
        why = f"its process ended with exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        return {"status": "failed", "why": why, "rows": [], "trace": self._said()}

    def _said(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines()[-LINES:]

    def close(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0.5 if self._process.poll() is None else 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


if __name__ == "__main__":
    serve(sys.argv[1], Day(**json.loads(sys.argv[2])))
