"""Pushing to the Hugging Face Hub: what it needs is checked before the work, and one that failed can be repeated."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from . import network

WAITS = (2.0, 8.0)  # seconds before the second and the third attempt
T = TypeVar("T")


class PushError(RuntimeError):
    """The Hub did not take what it was given; in one line, why."""


def local_faults(option: str, repo_id: str | None, by: str = "--push_to_hub") -> list[str]:
    """Return what stands in the way of a push and can be known without the network.

    Args:
        option: the option of the command line that gives `repo_id`, for the messages.
        repo_id: `name` or `namespace/name`; None: one that is made up later.
        by: what asks for the push, for the messages.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    faults = []
    if get_token() is None:
        faults.append(
            f"{by}: there is no Hugging Face token; set HF_TOKEN or run `hf auth login` (a token with write "
            f"access, from {network.endpoint()}/settings/tokens), or push later"
        )
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as err:
            faults.append(f"{option} {repo_id}: {_line(err)}; give a name such as duo_predict, or my-team/duo_predict")
    return faults


def access_faults(
    option: str, repo_id: str, private: bool, kind: str = "model", by: str = "--push_to_hub"
) -> list[str]:
    """Return why the Hub would not let the token's owner write `repo_id`; asked within seconds, and nothing is written.

    Args:
        option, by: as for `local_faults`.
        repo_id: `name`, in the owner's own namespace, or `namespace/name`.
        private: nobody else is to see it.
        kind: "model" or "dataset".
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    where = network.endpoint()
    if not network.reachable():
        return [
            f"{by}: the Hugging Face Hub ({where}) cannot be reached, or HF_HUB_OFFLINE is set; push "
            "later, from where there is a network"
        ]
    api = HfApi(endpoint=where)
    try:
        user = api.whoami()
    except Exception as err:  # the client's and the HTTP library's share no base class
        if isinstance(err, HfHubHTTPError) and err.response.status_code in (401, 403):
            return [f"{by}: {where} does not know the token; make a new one at {where}/settings/tokens"]
        return [f"{by}: {where} does not say whose the token is: {_line(err)}"]
    token = user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        return [f"{by}: the token may only read; make one with write access at {where}/settings/tokens"]
    may_not = {org["name"] for org in user.get("orgs", []) if org.get("roleInOrg") == "read"}
    namespaces = [user["name"], *(org["name"] for org in user.get("orgs", []) if org["name"] not in may_not)]
    repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
    if repo_id.split("/")[0] not in namespaces:
        return [f"{option} {repo_id}: {user['name']} may not write there; one of {', '.join(namespaces)} is allowed"]
    try:
        api.auth_check(repo_id, repo_type=kind, write=True)
        existing = api.repo_info(repo_id, repo_type=kind)
    except RepositoryNotFoundError as err:
        if not isinstance(err, GatedRepoError):
            return []  # it will be made
        return [f"{option} {repo_id}: {_line(err)}"]
    except Exception as err:
        return [f"{option} {repo_id}: cannot be written with this token: {_line(err)}"]
    if private and not existing.private:
        return [
            f"{option} {repo_id}: exists and is public, but --hub_private is asked for; make it private in its "
            "settings, or give another name"
        ]
    return []


def claim(repo_id: str, private: bool, kind: str = "model") -> str:
    """Make the repository unless it exists; its full name. Raises `PushError`."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=network.endpoint())
    return attempt(lambda: api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)).repo_id


def push_folder(folder: Path, repo_id: str, message: str, kind: str = "model") -> str:
    """Upload all of `folder` as one commit, so that the Hub has all of it or nothing; the commit's address.

    What an earlier attempt has uploaded of large files is not sent again.

    Raises:
        PushError: not even the third attempt succeeded, or the Hub refused.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=network.endpoint())
    with quiet_bars():
        commit = attempt(
            lambda: api.upload_folder(repo_id=repo_id, repo_type=kind, folder_path=folder, commit_message=message)
        )
    return commit.commit_url


@contextmanager
def quiet_bars() -> Iterator[None]:
    """While it lasts, progress bars of the Hub's client are drawn on a terminal only, not into a log file."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    switched_off = not are_progress_bars_disabled() and not sys.stderr.isatty()
    if switched_off:
        disable_progress_bars()
    try:
        yield
    finally:
        if switched_off:
            enable_progress_bars()


def attempt(do: Callable[[], T]) -> T:
    """Return what `do` returns, which talks to the Hub, in up to three tries. Raises `PushError`."""
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its warnings of attempts of its own show addresses with signatures
    try:
        for wait in (*WAITS, None):
            try:
                if not network.reachable(anew=True):  # the client itself would take half a minute to find out
                    raise ConnectionError(f"{network.endpoint()} cannot be reached")
                return do()
            except Exception as err:  # the client's, the HTTP library's and the operating system's share no base class
                # an upload's fault comes wrapped in one that names the file alone
                cause = err.__cause__ if type(err) is RuntimeError and isinstance(err.__cause__, Exception) else err
                if wait is None or not _may_pass(cause):
                    raise PushError(_line(cause)) from err
                print(f"note: the Hub: {_line(cause)}; trying again in {wait:.0f} s", file=sys.stderr)
                time.sleep(wait)
    finally:
        logging.set_verbosity(verbosity)
    raise AssertionError("the last attempt returns or raises")


def _may_pass(err: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(err, HfHubHTTPError):
        return err.response.status_code in (408, 429) or err.response.status_code >= 500
    return not isinstance(err, (ValueError, TypeError, FileNotFoundError, PermissionError))


def _line(err: Exception) -> str:
    """Return an error in one line, without the signatures that addresses of uploads carry."""
    text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", " ".join(str(err).split()))
    return f"{type(err).__name__}: {text}"[:300]
