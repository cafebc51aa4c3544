"""Several ranks on this machine: DeepSpeed's launcher, without its log, and with one end for all."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType

from . import signals
from .faults import UsageError
from .ranks import has_cuda

TO_THE_LAUNCHER = (signal.SIGINT, signal.SIGTERM)  # which it hands on to the ranks itself


def launch(ranks: str, words: list[str]) -> int:
    """Train with the options `words` on so many GPUs, or CPU processes where there is no GPU; the exit code.

    It is DeepSpeed's `deepspeed.launcher.launch`, which its command `deepspeed` starts too. Beside that command it says
    nothing of its own, takes a free port, and waits after a signal until the ranks have saved.

    Args:
        ranks: their number, as it was typed.

    Raises:
        UsageError: `ranks` is no number of devices that are here, or a launcher is at work already.
    """
    world = {"localhost": _devices(ranks)}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.launch", "--log_level=critical"]
    command += [f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={port}", "--module", __package__, "train", *words]
    env = dict(os.environ)
    # the package may lie beside the script that was started, and nowhere else
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [env.get("PYTHONPATH")])])
    if not has_cuda():
        env.setdefault("DS_ACCELERATOR", "cpu")
    numbers = signals.that_stop()
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number != signal.SIGINT:  # of Ctrl-C the terminal tells all processes
            process.send_signal(signal.SIGTERM)

    # The launcher would end at the others, sent to all processes: it and the ranks ignore them, and are told SIGTERM.
    with signals.handled([n for n in numbers if n not in TO_THE_LAUNCHER], signal.SIG_IGN):
        process = subprocess.Popen(command, env=env)
        with signals.handled(numbers, hand_on):
            code = process.wait()
    # after a signal the launcher's own code is 1, also where the ranks have saved
    return 128 + received[0] if received and code == 1 else code % 256


def _devices(ranks: str) -> list[int | str]:
    """Return the numbers of the devices, one for each rank."""
    if "RANK" in os.environ:
        raise UsageError(["--num_gpus: a launcher has started this process; give it to that one"])
    if not ranks.isdecimal() or not int(ranks):
        raise UsageError([f"--num_gpus {ranks}: a whole number, at least 1, is needed"])
    if not has_cuda():
        return list(range(int(ranks)))
    import torch

    visible: list[int | str] = list(range(torch.cuda.device_count()))
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        visible = [word.strip() for word in named.split(",")]
    if int(ranks) > len(visible):
        raise UsageError([f"--num_gpus {ranks}: {len(visible)} can be seen here"])
    return visible[: int(ranks)]
