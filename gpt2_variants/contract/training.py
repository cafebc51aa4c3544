"""Training: every parameter learns, and how it is computed changes nothing of what is computed."""

import tempfile
from typing import Any

import torch

from ..models.modeling_base import VariantLMHeadModel, recompute_blocks
from .subject import NotApplicable, Subject


def parameters_learn(subject: Subject) -> str | None:
    """Loss and gradients are finite, and each parameter has a gradient that is not zero."""
    model, ids = subject.model(tokens=48, layers=4).train(), subject.ids(2, 48)
    loss, gradients = _loss_and_gradients(model, ids)
    if not loss.isfinite():
        return f"the loss is {loss.item()}"
    for name, gradient in gradients.items():
        if gradient is None:
            return f"{name} gets no gradient"
        if not gradient.isfinite().all():
            return f"the gradient of {name} is not finite"
        if not gradient.any():
            return f"the gradient of {name} is zero everywhere"
    return None


def _loss_and_gradients(
    model: VariantLMHeadModel, ids: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    torch.manual_seed(5)
    model.zero_grad()
    loss = model(ids, labels=ids, skip_logits=True).loss
    loss.backward()
    return loss.detach(), {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def _differ(found: tuple[Any, Any], wanted: tuple[Any, Any], tolerance: float) -> str | None:
    if (off := (found[0] - wanted[0]).abs().item()) > tolerance:
        return f"the loss differs by {off:.2g}"
    for name, gradient in wanted[1].items():
        other = found[1][name]
        if gradient is None or other is None:
            continue
        if (off := (other - gradient).abs().max().item()) > tolerance + 1e-3 * gradient.abs().max().item():
            return f"the gradient of {name} differs by {off:.2g}"
    return None


def recomputed_alike(subject: Subject) -> str | None:
    """Gradient checkpointing gives the same loss and gradients, with dropout and noise."""
    model = subject.model(tokens=48, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1).train()
    ids = subject.ids(2, 48)
    wanted = _loss_and_gradients(model, ids)
    recompute_blocks(model)
    found = _differ(_loss_and_gradients(model, ids), wanted, 1e-5)
    return found and f"with gradient checkpointing {found}"


def compiled_alike(subject: Subject) -> str | None:
    """Blocks and loss are traced by torch.compile without a graph break, with the same loss and gradients."""
    if subject.quick:
        raise NotApplicable("compiling takes some seconds")
    model, ids = subject.model(tokens=48, layers=4).train(), subject.ids(2, 48)
    noisy = _draws_noise(model, ids, ids)
    wanted = _loss_and_gradients(model, ids)
    compile_function = torch.compile
    torch._dynamo.reset()
    traced: Any = lambda f, options=None, **others: compile_function(f, **others, backend="aot_eager", fullgraph=True)
    torch.compile = traced
    try:
        model.compile_parts()
        found = _loss_and_gradients(model, ids)
    except Exception as err:  # what dynamo raises has no common class
        return f"torch.compile stops: {type(err).__name__}: {str(err).strip().splitlines()[0]}"
    finally:
        torch.compile = compile_function
        torch._dynamo.reset()
    # a compiled graph draws other noise than an eager one
    fault = _differ(found, wanted, 1e-4) if not noisy else _differ((found[0], {}), (wanted[0], {}), 0.05)
    return fault and f"under torch.compile {fault}"


@torch.no_grad()
def _draws_noise(model: VariantLMHeadModel, ids: torch.Tensor, labels: torch.Tensor) -> bool:
    """Return whether the loss of a model in training mode hangs on the seed."""
    losses = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        losses.append(model(ids, labels=labels).loss.item())
    return losses[0] != losses[1]


def trains_in_trainer(subject: Subject) -> str | None:
    """A step of transformers' Trainer, in one batch and in parts of it, has the loss that the model has."""
    if subject.quick:
        raise NotApplicable("takes some seconds")
    try:
        from transformers import PrinterCallback, Trainer, TrainingArguments

        options: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        options |= {"logging_steps": 1, "max_steps": 1}
        with tempfile.TemporaryDirectory() as folder:
            TrainingArguments(folder, **options)
    except ImportError as err:
        raise NotApplicable(f"transformers' Trainer needs another package: {str(err).strip().splitlines()[0]}") from err
    # transformers' Trainer counts the first label of a row, which nothing predicts
    ids = subject.ids(8, 32)
    labels = ids.index_fill(1, torch.tensor([0]), -100)
    rows = [{"input_ids": row, "labels": own} for row, own in zip(ids, labels, strict=True)]
    for size, parts in ((8, 1), (2, 4)):
        model = subject.model(tokens=32).train()
        tolerance = 0.05 if _draws_noise(model, ids, labels) else 1e-3  # where noise is drawn, another one
        torch.manual_seed(5)
        wanted = model(ids, labels=labels).loss.item()
        with tempfile.TemporaryDirectory() as folder:
            asked = TrainingArguments(
                folder, per_device_train_batch_size=size, gradient_accumulation_steps=parts, **options
            )
            trainer = Trainer(model, asked, train_dataset=rows)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            found = next(record["loss"] for record in trainer.state.log_history if "loss" in record)
        if abs(found - wanted) > tolerance:
            what = f"in {parts} parts of {size} rows transformers' Trainer logs a loss of {found:.4f}"
            return f"{what}; it is {wanted:.4f}"
    return None
