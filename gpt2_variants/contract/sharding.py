"""ZeRO on two ranks: the stages 1 to 3 of DeepSpeed train alike."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .subject import NotApplicable, Subject

STAGES = (1, 2, 3)
TOLERANCE = 2e-3  # of a loss in nats: sums in bf16 are taken in another order


def stages_alike(subject: Subject) -> str | None:
    """Four steps in bf16 on two ranks with gloo have the same losses at each stage, to rounding."""
    if subject.quick:
        raise NotApplicable("takes half a minute")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise NotApplicable("this process is itself one of several ranks")
    variant = subject.variant
    with tempfile.TemporaryDirectory() as name:
        folder, asked = Path(name), variant.name
        if variant.code is not None:
            variant.code.copy_to(folder)
            asked = f"{folder / variant.code.file}:{variant.name}"
        program = [sys.executable, "-m", f"{__package__}.two_ranks", asked, str(folder / "losses.json")]
        environment = {**os.environ, "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *_python_path()])}
        ranks = [
            subprocess.Popen(
                program,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "STORE": str(folder / "store")},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        errors = [rank.communicate()[1] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            lines = [line for error in errors for line in error.strip().splitlines() if "Error" in line]
            return f"training on two ranks ends with an error: {lines[-1] if lines else errors[0][-200:]}"
        losses = json.loads((folder / "losses.json").read_text())
    first = losses[str(STAGES[0])]
    for stage in STAGES[1:]:
        for step, (one, other) in enumerate(zip(first, losses[str(stage)], strict=True), start=1):
            if abs(one - other) > TOLERANCE:
                return f"at ZeRO stage {stage} the loss of step {step} is {other:.4f}, at stage {STAGES[0]} {one:.4f}"
    return None


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
