"""What is done with a finished model: continue a text, tell how surprising its tokens are, evaluate on a text."""

import functools
import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging

from .data import DataError, default_split, encode, load_tokens, open_tokenizer
from .evaluation import evaluate, last_places, score_new_tokens, target_places, window_batches, window_starts
from .faults import UsageError
from .folders import MANIFEST, holds_checkpoints
from .network import HUB_ID
from .records import read_facts
from .registry import VARIANTS, Variant
from .spelling import Spelling
from .variant_code import VariantError, find, of_run
from .words import counted

if TYPE_CHECKING:
    from .models.modeling_base import VariantLMHeadModel
    from .models.streams import Stream


class SavedModel:
    """A model folder: an export of this package, a published checkpoint of a variant, or a stock GPT-2.

    The weights are read when they are first needed, so that the faults of a call can be told before. No code of the
    folder is run unless it is asked for: the classes are this package's, or those of a user's own file.

    Attributes:
        config: the model's.
        tokenizer_name: folder or Hub id of the tokenizer.
        tokenizer: as `tokenizer_name` says.
        spelling: the text of its tokens.
        block_size: tokens per training sequence, as far as the tokenizer knows; at most the model's positions.
        streams: what the model's class declares of its streams of predictions beside the next-token one.
        device: "cuda" where there is one, else "cpu".
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: str | None = None,
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        trust_remote_code: bool = False,
    ):
        """Read config and tokenizer.

        Args:
            folder: holds config.json, the weights and, usually, the tokenizer.
            tokenizer: a folder or a Hub id; None: `folder`.
            dtype: of the weights.
            variant: the file or module of a user's own variant that the model is of, as `--variant` names it. None:
                one of the package, or the copy that the run keeps whose `model/` this is.
            trust_remote_code: run the model's code that lies in `folder`.

        Raises:
            UsageError: no model there, a model whose code is not known, or no tokenizer for it.
        """
        self.folder, self.dtype = folder, dtype
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model_class = _model_class(folder, variant, trust_remote_code)
        self.streams: tuple[Stream, ...] = getattr(self._model_class, "streams", ())
        try:
            self.config = self._model_class.config_class.from_pretrained(folder)
        except Exception as err:  # the config classes raise ValueError and huggingface_hub's validation errors alike
            raise UsageError([f"--model {folder}: config.json does not fit: {_line(err)}"]) from err
        self.tokenizer_name = str(folder) if tokenizer is None else tokenizer
        if self.tokenizer_name == "builtin":
            raise UsageError(
                ["--tokenizer builtin: is trained anew on each text; give the one the model was trained with"]
            )
        try:
            self.tokenizer = open_tokenizer(self.tokenizer_name)
        except DataError as err:
            raise UsageError(str(err).splitlines()) from err
        self.spelling = Spelling(self.tokenizer)
        self.block_size = min(self.config.n_positions, self.tokenizer.model_max_length)

    @functools.cached_property
    def model(self) -> "VariantLMHeadModel":
        """The model on `device`, in eval mode. Raises `UsageError` where weights are missing or do not fit."""
        logging.disable_progress_bar()
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # its table of missing and surplus weights; they are faults here
        try:
            loaded: Any = self._model_class.from_pretrained(self.folder, dtype=self.dtype, output_loading_info=True)
            model, info = loaded  # transformers says: a model
        except Exception as err:  # of files, of safetensors, of shapes that differ
            raise UsageError([f"--model {self.folder}: the weights cannot be loaded: {_line(err)}"]) from err
        finally:
            logging.set_verbosity(verbosity)
        # transformers would go on, with random weights or with another model than was saved.
        if missing := sorted(info["missing_keys"]):
            raise UsageError(
                [f"--model {self.folder}: without {counted(len(missing), 'weight')}, such as {missing[0]}"]
            )
        if unknown := sorted(info["unexpected_keys"]):
            raise UsageError(
                [
                    f"--model {self.folder}: has {counted(len(unknown), 'weight')}, such as {unknown[0]}, of no part "
                    "of the model that its config.json describes; correct that (rotating heads with norms: use_norm "
                    "true)"
                ]
            )
        return model.to(self.device).eval()

    def encode(self, prompt: str) -> torch.Tensor:
        """Return the prompt's ids, (1, P).

        Raises:
            UsageError: the tokenizer cannot encode it, it has no ids, or no position is left to continue on.
        """
        try:
            encoded = encode(self.tokenizer, self.tokenizer_name, [prompt], special_tokens=True)
        except DataError as err:
            raise UsageError(str(err).splitlines()) from err
        ids = torch.tensor(encoded, dtype=torch.long)
        if not ids.numel():
            raise UsageError(["the prompt is empty: give at least one token"])
        self.check_ids(int(ids.max()))
        if ids.shape[1] >= self.config.n_positions:
            raise UsageError(
                [
                    f"the prompt has {counted(ids.shape[1], 'token')}, the model "
                    f"{counted(self.config.n_positions, 'position')}: give a shorter one"
                ]
            )
        return ids

    def check_ids(self, largest: int) -> None:
        """Raise `UsageError` if the tokenizer gives an id that the model has no entry for."""
        if largest >= self.config.vocab_size:
            raise UsageError(
                [
                    f"--tokenizer {self.tokenizer_name}: gives the id {largest}, the model has "
                    f"{self.config.vocab_size} entries; give the tokenizer the model was trained with"
                ]
            )

    def generate(
        self,
        ids: torch.Tensor,
        max_new_tokens: int = 60,
        temperature: float = 0.8,
        top_k: int = 40,
        seed: int = 0,
        stream: bool = False,
    ) -> torch.Tensor:
        """Continue a prompt (1, P), to at most the model's positions: (1, P + new tokens), on the CPU.

        Args:
            temperature: divides the logits before sampling; 0 takes the most probable token.
            top_k: sample from so many most probable tokens; 0: from all.
            seed: of the sampling.
            stream: print prompt and continuation to stdout, word by word as they come.
        """
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {}
        )
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        torch.manual_seed(seed)
        continued: Any = self.model.generate(  # type: ignore[misc]  # a protocol that GPT-2 does not meet either
            ids.to(self.device),
            attention_mask=torch.ones_like(ids).to(self.device),
            max_new_tokens=min(max_new_tokens, self.config.n_positions - ids.shape[1]),
            pad_token_id=pad,
            streamer=self.spelling.streamer() if stream else None,
            **(sampling or {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}),
        )
        return continued.cpu()

    def decode(self, ids: torch.Tensor) -> str:
        """Return the text of ids (N,); bytes that are no characters as escapes such as `\\xe2`."""
        return self.spelling.text(ids.tolist())

    def surprise(self, ids: torch.Tensor) -> dict[str, list[float]]:
        """-log p of each token in nats, for ids (1, N), N >= 2; one column for each way of predicting, N entries each.

        "given its past": each token given those before it. Then, by its title, each further stream of the model. NaN
        where a stream does not predict the token.
        """
        titles = {"next_token": "given its past", **{stream.name: stream.title for stream in self.streams}}
        places = target_places(self.model, ids.shape[1])
        columns = {}
        for name, scores in self.model.score(ids.to(self.device)).items():
            valid = scores.valid[0].cpu()
            column = torch.full((ids.shape[1],), torch.nan, dtype=torch.float64)
            column[places[name].cpu()[valid]] = scores.nll[0].cpu().double()[valid]
            columns[titles.get(name, name)] = column.tolist()
        return columns

    def evaluate(self, tokens: np.ndarray, block_size: int, stride: int, batch_size: int = 8) -> dict[str, float]:
        """`evaluation.evaluate`'s figures of `tokens` (N,), N >= 2, by windows as in `evaluation.window_starts`."""
        windows = len(window_starts(len(tokens), block_size, stride))
        batches = window_batches(tokens, block_size, stride, batch_size)
        # disable=None: shown on a terminal only
        batches = tqdm(batches, total=math.ceil(windows / batch_size), unit="batch", disable=None)
        last = last_places(self.model, min(block_size, len(tokens)))
        return evaluate(functools.partial(score_new_tokens, self.model.score, last), batches, self.device)


def _model_class(folder: Path, variant: str | None, trust_remote_code: bool) -> "type[VariantLMHeadModel]":
    if not (folder / "config.json").is_file():
        raise UsageError([f"--model {folder}: no exported model there (no config.json); {_where_one_is(folder)}"])
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except (ValueError, KeyError, TypeError):
        raise UsageError([f"--model {folder}: config.json names no model_type"]) from None
    own = _own_variant(folder, variant)
    records = [*VARIANTS.values(), *([own] if own else [])]
    classes = {record.config_class.model_type: record.model_class for record in records}
    if model_type in classes:
        return classes[model_type]
    code = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    if trust_remote_code and code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(code, folder)
    cure = f"models of {', '.join(classes)} can be used"
    if code:
        cure += (
            "; of another, give --variant with the file that it was trained from, or --trust_remote_code to run the "
        )
        cure += f"code in {folder}"
    raise UsageError([f"--model {folder}: is of the type {model_type}; {cure}"])


def _where_one_is(folder: Path) -> str:
    unexported = (folder / MANIFEST).is_file()  # a checkpoint, whose model/ has no weights
    if not unexported and (folder / "model" / "config.json").is_file():
        return f"it is a run's folder: give {folder / 'model'}"
    if unexported or holds_checkpoints(folder):
        return f"python -m gpt2_variants export --checkpoint {shlex.quote(str(folder))} --output_dir FOLDER makes one"
    if not folder.exists() and HUB_ID.fullmatch(str(folder)) and len(folder.parts) == 2:
        return f"of the Hugging Face Hub, hf download {folder} --local-dir {folder.name} fetches one"
    return "give a folder that holds one, such as runs/duo_predict/model"


def _own_variant(folder: Path, variant: str | None) -> Variant | None:
    """Return the user's own variant that is named, or that the run of the model in `folder` keeps a copy of."""
    try:
        if variant is not None:
            return find(variant)
        run = folder.absolute().parent
        plan = read_facts(run).get("plan", {}) if (run / "run.json").is_file() else {}
        return of_run(run, plan) if plan.get("variant_code") else None
    except VariantError as err:
        raise UsageError([f"--variant {err}"]) from err
    except ValueError as err:
        raise UsageError([f"--model {folder}: {err}"]) from err


def _line(err: Exception) -> str:
    return " ".join(str(err).split())


def surprise_table(saved: SavedModel, ids: torch.Tensor, prompt_length: int) -> str:
    """Return a table of `SavedModel.surprise` for ids (1, N), of which the first `prompt_length` are the prompt."""
    columns = saved.surprise(ids)
    rows = [["", "token", *columns]]
    for n, (token, *values) in enumerate(zip(ids[0].tolist(), *columns.values(), strict=True)):
        origin = "prompt" if n < prompt_length else "generated"
        text = saved.spelling.quoted(token)
        rows.append([origin, text, *("-" if math.isnan(value) else f"{value:.2f}" for value in values)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["surprise in nats (-log p)"]
    for origin, text, *values in rows:
        numbers = (value.rjust(width) for value, width in zip(values, widths[2:], strict=True))
        lines.append("  ".join([origin.ljust(widths[0]), text.ljust(widths[1]), *numbers]))
    return "\n".join(lines)


def evaluate_dataset(
    saved: SavedModel, dataset: str, split: str | None, block_size: int, stride: int, batch_size: int
) -> dict[str, Any]:
    """Evaluate on a source, as `--dataset` names it: the figures of `SavedModel.evaluate`, and what they are of.

    Args:
        split: as for `data.load_tokens`; None: `data.default_split`.

    Raises:
        DataError: the source cannot be had.
        UsageError: it has fewer than 2 tokens, or the tokenizer does not belong to the model.
    """
    split = split or default_split(dataset)
    tokens = load_tokens(dataset, saved.tokenizer_name, block_size, split)
    if len(tokens) < 2:
        raise UsageError(
            [
                f"--dataset {dataset}: {counted(len(tokens), 'token')}; at least 2 are needed, one to "
                "predict the next from"
            ]
        )
    saved.check_ids(int(tokens.max()))
    return {
        "model": str(saved.folder),
        "tokenizer": saved.tokenizer_name,
        "dataset": dataset,
        "split": split,
        "num_tokens": len(tokens),
        "window_size": min(block_size, len(tokens)),
        "stride": stride,
        "num_windows": len(window_starts(len(tokens), block_size, stride)),
        "dtype": str(saved.dtype).removeprefix("torch."),
        "device": saved.device,
        **saved.evaluate(tokens, block_size, stride, batch_size),
    }
