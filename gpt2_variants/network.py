"""Whether the Hugging Face Hub, or another server, can be reached, found out within seconds; how to stay offline."""

import functools
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
PROBE_SECONDS = 3.0


def endpoint() -> str:
    """Return the Hub's address."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def reachable(anew: bool = False) -> bool:
    """Return whether the Hub answers; found out once per process and endpoint, or `anew`.

    Asked first because without a network the Hub's own client needs 23 s to give up, 385 s where packets are swallowed.
    """
    switches = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in switches):
        return False
    if anew:
        answers.cache_clear()
    return answers(endpoint())


@functools.cache
def answers(endpoint: str) -> bool:
    """Return whether `endpoint` gives an HTTP answer within 3 seconds, through the environment's proxy if it names one.

    Asked once per process.
    """
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS):
                answered.set()
        except urllib.error.HTTPError as error:
            if error.code < 500:  # a refusal is an answer; 5xx is a gateway with nothing behind it
                answered.set()
        except (OSError, ValueError):
            pass
        finally:
            done.set()

    done = threading.Event()
    # In a thread of its own: the timeout of a socket does not cover the look-up of the name.
    threading.Thread(target=ask, daemon=True).start()
    done.wait(PROBE_SECONDS)
    return answered.is_set()


@contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """Keep the Hugging Face libraries off the network while inside, whether or not they were imported before.

    They read HF_HUB_OFFLINE only when imported, so that the variables made from it are set instead. The switch is put
    back afterwards: a push at the end of training may find the network again.
    """
    import datasets.config
    import huggingface_hub.constants

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    if wanted:
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def hub_cache_has(model_id: str, names: Iterable[str]) -> bool:
    """Return whether Hugging Face's cache holds one of the files `names` of the model repository `model_id`."""
    import huggingface_hub.constants

    snapshots = Path(huggingface_hub.constants.HF_HUB_CACHE, "models--" + model_id.replace("/", "--"), "snapshots")
    return any(any(snapshots.glob(f"*/{name}")) for name in names)
