"""What all tests share: no network, no W&B, small thread pools, tiny models."""

import importlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
os.environ.pop("WANDB_API_KEY", None)
os.environ["OMP_NUM_THREADS"] = "1"  # models this small gain nothing from more, and tests run side by side

from pathlib import Path

import pytest
import torch
from forked import Forked, can_be_forked

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_ds
from gpt2_variants import VARIANTS, register

register()  # tests load exports by the Auto classes; test_registration.py has processes of its own

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden"
# One of each family in every run, with all that it can have; all of them in the slow tests.
FAMILIES = ("gpt2", "duo_predict", "drift_diffusion", "parallel_concat", "rotating_head_norm")


def of_each_family(names):
    """`names` as parameters of a test: the variants that FAMILIES lacks among the slow ones."""
    late = set(VARIANTS) - set(FAMILIES)
    return [pytest.param(name, marks=pytest.mark.slow) if name in late else name for name in names]


def tiny(variant: str, seed: int = 0, attn_implementation: str = "sdpa", **fields):
    """A small model of `variant` in eval mode: 2 layers, width 32, 4 heads, 48 positions, a tokenizer of 67 entries."""
    values = {"n_layer": 2, "n_embd": 32, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0, **fields}
    config = VARIANTS[variant].make_config("nano", 67, **{"n_positions": 48, **values})
    torch.manual_seed(seed)
    return VARIANTS[variant].model_class._from_config(config, attn_implementation=attn_implementation).eval()


def from_benchmarks(name: str):
    """A fixture: that module of benchmarks/, whose folder is on the path while this module's tests run."""

    @pytest.fixture(scope="module", name=name)
    def module():
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(ROOT / "benchmarks")
            yield importlib.import_module(name)

    return module


def script(path: str):
    """The module in the file `path`; not found by sys.path, where benchmarks/lm_eval could be taken for lm_eval."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=sorted(VARIANTS))
def variant(request) -> str:
    """Every variant's name, one after the other."""
    return request.param


@pytest.fixture
def poisoned():
    """New memory holds NaN, as it may, until something is written to it."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def random_ids(batch: int = 2, tokens: int = 24, seed: int = 1) -> torch.Tensor:
    """(batch, tokens) ids below 67, without the mask entry."""
    return torch.randint(0, 67, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Prepared data go to a folder of this test session."""
    os.environ["GPT2_VARIANTS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A small English-like text: sentences of a fixed grammar, so that a model learns something within a few steps."""
    rng = random.Random(0)
    nouns = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school")
    verbs = ("sees", "makes", "takes", "finds", "gives", "tells", "asks", "works", "calls", "tries", "needs", "feels")
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    sentence = lambda: f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}.\n"
    path.write_text("".join(sentence() for _ in range(4000)))
    return path


@pytest.fixture(scope="session")
def tiny_run(corpus) -> list[str]:
    """Options of a run of a few seconds: 2 layers, width 32, blocks of 32 tokens, 8 a step, dropout on."""
    return [
        *("--preset", "demo", "--dataset", str(corpus), "--report_to", "none", "--block_size", "32"),
        *("--train_batch_size", "8", "--logging_steps", "1", "--eval_steps", "5", "--save_steps", "5"),
        *("--model_args", "n_layer=2", "n_embd=32", "n_head=2", "n_positions=32"),
        *("resid_pdrop=0.1", "embd_pdrop=0.1", "attn_pdrop=0.1"),
    ]


@pytest.fixture(scope="session")
def ds_json(tmp_path_factory):
    """A DeepSpeed JSON: the default one with sections replaced, e.g. `ds_json(bf16={"enabled": False})`."""
    folder = tmp_path_factory.mktemp("ds")

    def write(**sections) -> str:
        config = json.loads((ROOT / "ds_configs" / "zero1.json").read_text())
        config.update({"train_batch_size": "auto", **sections})
        config["optimizer"]["params"].update(lr="auto", weight_decay=0.1)
        path = folder / f"{abs(hash(str(sections)))}.json"
        path.write_text(json.dumps(config))
        return str(path)

    return write


@pytest.fixture
def in_process(monkeypatch):
    """For `train`: a run in this process takes over SIGINT and SIGTERM; its closing plot and sample are left out."""
    monkeypatch.setattr("gpt2_variants.report.show", lambda run: None)
    saved = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in saved.items():
        signal.signal(number, handler)


def train(tiny_run, folder: Path, *more: str, variant: str = "duo_predict", code: int = 0) -> Path:
    """A run in this process that ends with exit code `code`; its folder."""
    assert train_ds.main(["--variant", variant, *tiny_run, "--output_dir", str(folder), *more]) == code
    return folder


def zero(stage: int) -> dict:
    """DeepSpeed's section for a ZeRO stage; at stage 3 with thresholds of 0, or models this small stay whole."""
    names = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
    return {"stage": stage} | ({f"stage3_{name}": 0 for name in names} if stage == 3 else {})


TRAIN_DS = (str(ROOT / "train_ds.py"),)


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(
    ranks: int, arguments: list[str], program: tuple[str, ...] = TRAIN_DS, fresh: bool = False, closing: bool = False
) -> list[subprocess.Popen | Forked]:
    """`program`, `train_ds.py`, on `ranks` processes, without DeepSpeed's launcher (which costs 5 s).

    They are forked with the libraries imported, and end without plot and report unless `closing`; if they shall be
    `fresh`, or their environment is another than that of the rest, they are started as a user's are.
    """
    port = free_port()
    processes = []
    for rank in range(ranks):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        env |= {"TORCH_COMPILE_DISABLE": "1", "TORCHDYNAMO_DISABLE": "1"}  # saves a second in deepspeed.initialize
        words = [*program, *arguments]
        if fresh or not can_be_forked(env):
            piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen([sys.executable, *words], env=env, cwd=ROOT, **piped))
        else:
            processes.append(Forked(words, env, ROOT, closing))
    return processes


def patience(seconds: float) -> float:
    """Return how long a test may wait here and now for what takes less than `seconds` on a free core.

    The wait is longer by as much as the machine is busy with other work: by the processes that want a core, and by how
    long a moment's work takes beside them. `GPT2_VARIANTS_TEST_PATIENCE` multiplies it, for a machine that is slow.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < 0.02:
        pass
    busy = max(1.0, os.getloadavg()[0] / os.cpu_count(), (time.perf_counter() - wall) / (time.process_time() - cpu))
    return seconds * busy * float(os.environ.get("GPT2_VARIANTS_TEST_PATIENCE", "1"))


def wait_until(happened, process: subprocess.Popen | None = None, seconds: float = 120) -> None:
    """Wait until `happened()` is true; fails if `process` ends before, or if it takes more than `patience(seconds)`."""
    began = time.monotonic()
    while not happened():
        assert process is None or process.poll() is None, process.communicate()
        if time.monotonic() - began > seconds:  # the load is asked for anew: it may have risen since
            assert time.monotonic() - began < patience(seconds), f"nothing within {patience(seconds):.0f} s"
        time.sleep(0.02)


def output_of(process: subprocess.Popen, seconds: float = 120) -> tuple[str, str]:
    """(stdout, stderr) of a process that ends by itself; it is killed if that takes more than `patience(seconds)`."""
    began = time.monotonic()
    while True:
        try:
            return process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            if time.monotonic() - began > patience(seconds):
                process.kill()
                raise


def run_to_end(command: list[str], seconds: float = 120, **popen) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with the output as text, for no more than `patience(seconds)`."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen) as process:
        output = output_of(process, seconds)
    return subprocess.CompletedProcess(command, process.returncode, *output)


def python_program(*words: object, cwd: Path = ROOT, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """Run Python with these words of a command line, in a process that is forked where it may be (see `launch`)."""
    program, env = list(map(str, words)), dict(os.environ)
    if can_be_forked(env):
        process = Forked(program, env, cwd, closing=True)
        output = output_of(process, seconds)
        return subprocess.CompletedProcess(program, process.returncode, *output)
    return run_to_end([sys.executable, *program], seconds, cwd=cwd)


def finish(processes: list[subprocess.Popen], seconds: float = 120) -> list[tuple[int, str]]:
    """(exit code, stderr) of each process; kills them all if one hangs."""
    try:
        errors = [output_of(p, seconds)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, err) for p, err in zip(processes, errors, strict=True)]


def write_text(path: Path, text: str) -> str:
    """Write `text` exactly, in a folder that is made; the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def python(code: str, *args: object) -> subprocess.Popen:
    """Run code that begins with `from gpt2_variants import data` in a process of its own."""
    code = "import os, sys, time\nfrom pathlib import Path\nfrom gpt2_variants import data\n" + textwrap.dedent(code)
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def metrics(folder: Path) -> list[dict]:
    """The records of a run's metrics.jsonl without what hangs on the clock or the machine."""
    clock = {"elapsed_seconds", "tokens_per_second", "mfu", "peak_memory_bytes"}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def record(folder: Path) -> dict:
    """A run's run.json."""
    return json.loads((folder / "run.json").read_text())


def wait_for_steps(process, folder: Path, steps: int) -> None:
    """Return when the run has logged that many."""
    file = folder / "metrics.jsonl"
    wait_until(lambda: file.exists() and file.read_bytes().count(b'"loss"') >= steps, process)


@pytest.fixture
def text_of(monkeypatch):
    """The report's text, without the time that its charts take."""
    from gpt2_variants import report
    from gpt2_variants.report.charts import Curves

    monkeypatch.setattr("gpt2_variants.report.page.curves_of", lambda groups: Curves({}, [], [], []))
    monkeypatch.setattr("gpt2_variants.report.page.forests", lambda verdicts: [])
    return lambda folders, output_dir=None: report.write(folders, output_dir).text
