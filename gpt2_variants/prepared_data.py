"""A data set tokenised and cut once, for others to train on: saved to a folder, pushed to the Hub, or both.

Training on what is made here sees the blocks, in their order, that training on the source itself would see.
"""

import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from . import hub_client, network
from .data import Data, Reading, check_source, load, quiet, source_name
from .faults import UsageError
from .folders import new_folder_faults

if TYPE_CHECKING:
    import datasets

TOKENIZER = "tokenizer"
CARD = "README.md"
SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B")  # the Hub's size categories, in rows


@dataclass(frozen=True)
class Request:
    """What is to be made of what, as the options of `python -m gpt2_variants prepare`.

    Attributes:
        dataset, tokenizer, block_size: as for training.
        output_dir: a new folder; None: none is saved.
        push_to_hub, hub_dataset_id, hub_private: whether to push, where to, and whether nobody else is to see it.
        reading: how the source is to be read.
    """

    dataset: str
    tokenizer: str
    block_size: int
    output_dir: Path | None = None
    push_to_hub: bool = False
    hub_dataset_id: str | None = None
    hub_private: bool = False
    reading: Reading = field(default_factory=Reading)

    def again(self) -> str:
        """Return the command that repeats the push, and saves no folder."""
        words = ["--dataset", self.dataset, "--tokenizer", self.tokenizer, "--block_size", str(self.block_size)]
        words += [word for name, value in self.reading.identity().items() for word in (f"--{name}", str(value))]
        words += ["--push_to_hub", "--hub_dataset_id", str(self.hub_dataset_id)]
        return shlex.join(["python", "-m", "gpt2_variants", "prepare", *words, *["--hub_private"] * self.hub_private])


def faults(request: Request) -> list[str]:
    """Return what stands in the way, one line each, found within seconds; the Hub is asked, and nothing is written."""
    lines = check_source(request.dataset, request.tokenizer, request.reading)
    if request.output_dir is not None:
        lines += new_folder_faults(request.output_dir)
    if not request.push_to_hub:
        given = {"hub_dataset_id": request.hub_dataset_id, "hub_private": request.hub_private}
        useless = [name for name, value in given.items() if value]
        lines += [f"--{name}: has no effect without --push_to_hub; add that, or leave it out" for name in useless]
        if request.output_dir is None and not useless:
            lines.append("--output_dir: is missing; give a new folder, or --push_to_hub with --hub_dataset_id, or both")
        return lines
    if request.hub_dataset_id is None:
        lines.append("--push_to_hub: needs --hub_dataset_id, a name or namespace/name for the data set on the Hub")
    hub_lines = hub_client.local_faults("--hub_dataset_id", request.hub_dataset_id)
    if request.hub_dataset_id is not None and not hub_lines:
        hub_lines = hub_client.access_faults(
            "--hub_dataset_id", request.hub_dataset_id, request.hub_private, kind="dataset"
        )
    return lines + hub_lines


def prepare(request: Request) -> int:
    """Make what `request`, which has no `faults`, asks for, and print what was made and how to train on it.

    Returns:
        The exit code: 0; 1 where the Hub did not take it. Then the folder, if one was asked for, is complete, and the
        command that repeats the push is printed; it is quick, since `load` keeps what it prepares.

    Raises:
        DataError: as `load`.
        UsageError: the folder was made by somebody else in the meantime.
    """
    data = load(request.dataset, request.tokenizer, request.block_size, reading=request.reading)
    for note in data.notes:
        print(f"reading     {note}")
    train, validation = (f"{len(part):,}" for part in (data.train, data.validation))
    tokens = len(data.train) * request.block_size
    print(f"blocks      train {train}, validation {validation}, of {request.block_size} tokens")
    print(f"tokens      {tokens:,} to train on, of a vocabulary of {data.vocab_size:,}")
    print(f"fingerprint {data.fingerprint}")
    folder = request.output_dir
    if folder is not None:
        _save(data, request, folder)
        print(f"saved       {folder}")
        print(f"train on it {_train(str(folder), f'{folder}/{TOKENIZER}', request.block_size)}", flush=True)
    if not request.push_to_hub:
        return 0
    try:
        name = _push(data, request)
    except hub_client.PushError as err:
        print(
            f"error: not pushed to {request.hub_dataset_id}: {err}\n"
            + (f"{folder} is complete; " if folder is not None else "")
            + f"to repeat the push: {request.again()}",
            file=sys.stderr,
        )
        return 1
    print(f"pushed      {network.endpoint()}/datasets/{name}")
    commands = _train_from_hub(name, request)
    print("\n".join(f"{'train on it' if i == 0 else '':<11} {line}" for i, line in enumerate(commands)))
    return 0


def _parts(data: Data) -> "datasets.DatasetDict":
    """Return both parts with nothing beside them: what `datasets` notes of a local source holds its path."""
    from datasets import Dataset, DatasetDict, DatasetInfo, Split

    parts = {Split.TRAIN: data.train.rows, Split.VALIDATION: data.validation.rows}
    return DatasetDict(
        {
            str(split): Dataset(rows.data, info=DatasetInfo(features=rows.features), split=split)
            for split, rows in parts.items()
        }
    )


def _save(data: Data, request: Request, folder: Path) -> None:
    """Write the blocks as `datasets.load_from_disk` reads them, tokenizer and card: aside, then moved into place."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as aside, quiet():
        made = Path(aside, folder.name)
        _parts(data).save_to_disk(str(made))
        data.tokenizer.save_pretrained(str(made / TOKENIZER))
        commands = [_train(folder.name, f"{folder.name}/{TOKENIZER}", request.block_size)]
        opened = f'datasets.load_from_disk("{folder.name}")'
        (made / CARD).write_text(_card(data, request, folder.name, commands, opened), encoding="utf-8")
        try:
            os.rename(made, folder)
        except OSError as err:
            raise UsageError([f"--output_dir {folder}: cannot be made ({err.strerror}); give a new folder"]) from err


def _push(data: Data, request: Request) -> str:
    """Push tokenizer and card, then the blocks as Parquet files; the repository's full name. Raises `PushError`.

    Either is one commit. What an earlier attempt has uploaded of the blocks is not sent again.
    """
    assert request.hub_dataset_id is not None
    with tempfile.TemporaryDirectory() as aside, _quiet_push():
        name = hub_client.claim(request.hub_dataset_id, request.hub_private, kind="dataset")
        if (there := _card_on_hub(name)) is not None and data.fingerprint not in there:
            raise hub_client.PushError(
                f"{name} holds something else, which is not overwritten; give another --hub_dataset_id, or delete it"
            )
        short = name.split("/")[-1]
        opened = f'datasets.load_dataset("{name}")'
        card = _card(data, request, short, _train_from_hub(name, request), opened)
        Path(aside, CARD).write_text(card, encoding="utf-8")
        data.tokenizer.save_pretrained(str(Path(aside, TOKENIZER)))
        hub_client.push_folder(Path(aside), name, "Tokenizer and card", kind="dataset")
        parts = _parts(data)
        hub_client.attempt(lambda: parts.push_to_hub(name, commit_message="Blocks of token ids"))
    return name


def _card_on_hub(name: str) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    api = HfApi(endpoint=network.endpoint())

    def read() -> str | None:
        with tempfile.TemporaryDirectory() as aside:
            try:
                file = api.hf_hub_download(name, CARD, repo_type="dataset", local_dir=aside)
            except EntryNotFoundError:
                return None
            return Path(file).read_text(encoding="utf-8")

    return hub_client.attempt(read)


@contextmanager
def _quiet_push() -> Iterator[None]:
    """Show progress on a terminal only, and no advice from `datasets` on processes that nobody asked for."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    try:
        with quiet(), hub_client.quiet_bars():
            yield
    finally:
        datasets.logging.set_verbosity(verbosity)


def _train(dataset: str, tokenizer: str, block_size: int) -> str:
    options = ["--dataset", dataset, "--tokenizer", tokenizer, "--block_size", str(block_size)]
    return shlex.join(["deepspeed", "train_ds.py", "--variant", "gpt2", *options])


def _train_from_hub(name: str, request: Request) -> list[str]:
    """Return the commands that train on the pushed set; a tokenizer goes by its name only where it is a model's."""
    if tokenizer := _tokenizer_on_hub(request):
        return [_train(name, tokenizer, request.block_size)]
    short = name.split("/")[-1]
    fetch = ["hf", "download", name, "--repo-type", "dataset", "--include", f"{TOKENIZER}/*", "--local-dir", short]
    return [shlex.join(fetch), _train(name, f"{short}/{TOKENIZER}", request.block_size)]


def _tokenizer_on_hub(request: Request) -> str | None:
    return None if request.tokenizer == "builtin" else source_name(request.tokenizer).hub_id


def _card(data: Data, request: Request, title: str, commands: list[str], opened: str) -> str:
    """Return the page of the data set, Markdown with the Hub's metadata at its head; of local paths the last part only.

    Args:
        commands: that train on it.
        opened: the Python expression that reads it.
    """
    from huggingface_hub import DatasetCardData

    source = source_name(request.dataset)
    if request.tokenizer == "builtin":
        tokenizer = "a byte-level BPE trained on the training part"
    else:
        tokenizer = f"`{_tokenizer_on_hub(request) or source_name(request.tokenizer).name}`"
    blocks = len(data.train) + len(data.validation)
    metadata = DatasetCardData(
        pretty_name=title,
        language=source.language,
        task_categories=["text-generation"],
        size_categories=[_size_category(blocks)],
        source_datasets=[source.hub_id] if source.hub_id else None,
        tags=["gpt2_variants"],
    ).to_yaml()
    rows = [
        f"| {split} | {len(part):,} | {len(part) * part.block_size:,} |"
        for split, part in (("train", data.train), ("validation", data.validation))
    ]
    text = [
        f"---\n{metadata}\n---",
        f"# {title}",
        f"{source.name}, tokenised and cut into blocks of {request.block_size:,} token ids (column `input_ids`) by "
        "the package `gpt2_variants`.",
        "\n".join(["| split | blocks | tokens |", "|---|---|---|", *rows]),
        f"- Source: {data.summary}\n"
        f"- Tokenizer: {tokenizer}, {data.vocab_size:,} entries, in `{TOKENIZER}/`; no special tokens, and no "
        "separator between rows\n"
        f"- Fingerprint of training blocks and vocabulary: `{data.fingerprint}`",
        "## Train on it",
        "A run sees the blocks, in their order, that it would see of the source. With another `--block_size` the "
        "blocks of each split are one stream of tokens, cut anew.",
        "\n".join(["```bash", *commands, "```"]),
        "## Read it",
        f"```python\nimport datasets\n\nblocks = {opened}\n```",
        "## License",
        "That of the text.",
    ]
    return "\n\n".join(text) + "\n"


def _size_category(rows: int) -> str:
    bounds = [10 ** (3 + i) for i in range(len(SIZES))]
    above = sum(rows >= bound for bound in bounds)
    if above == 0:
        return f"n<{SIZES[0]}"
    return f"{SIZES[above - 1]}<n<{SIZES[above]}" if above < len(SIZES) else f"n>{SIZES[-1]}"
