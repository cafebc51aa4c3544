"""The losses of an optimizer step: added up on the device, and asked of it only where they are logged."""

from typing import Any

import torch
import torch.distributed as dist

from ..models.modeling_base import VariantOutput


class StepLosses:
    """One rank's part of the losses of one optimizer step.

    Args:
        accumulation: micro-batches in the step.
        device: of the model.
    """

    def __init__(self, accumulation: int, device: torch.device):
        self._accumulation = accumulation
        self._total = torch.zeros((), device=device)
        self._streams: dict[str, torch.Tensor] = {}

    def add(self, output: VariantOutput) -> None:
        """Take what the model gives for one micro-batch, its loss divided by the micro-batch's share of the labels."""
        assert output.loss is not None
        self._total += output.loss.detach()
        for name, sums in (output.stream_sums or {}).items():
            self._streams[name] = self._streams[name] + sums if name in self._streams else sums

    @property
    def of_rank(self) -> torch.Tensor:
        """A scalar, on the device: the mean over the ranks is the loss of the global batch."""
        return self._total / self._accumulation

    def means(self) -> dict[str, Any]:
        """Return "loss", "next_token_loss", and the like of every further stream, of the global batch and in nats.

        A stream's is the mean over its predictions, all alike; None where there are none. To be called on all ranks;
        waits for the device, once.
        """
        loss = self.of_rank
        dist.all_reduce(loss)
        sums = torch.stack(list(self._streams.values())) if self._streams else loss.new_zeros(0, 2)
        if self._streams:
            dist.all_reduce(sums)
        total, *of_streams = torch.cat([loss.view(1), sums.flatten()]).tolist()
        mean = total / dist.get_world_size()
        if not self._streams:
            return {"loss": mean, "next_token_loss": mean}
        pairs = zip(self._streams, of_streams[::2], of_streams[1::2], strict=True)
        return {"loss": mean, **{f"{name}_loss": nll / count if count else None for name, nll, count in pairs}}
