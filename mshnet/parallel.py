"""What makes an update the same however many processes share it: shares, batch norm, dropout.

The rule: an update is a function of (seed, epoch, position), never of who computes it. Episodes that go
through the network together are a *part*; the processes share it, each one a run of neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from mshnet.errors import InputError
from mshnet.profiling import region


@dataclass(frozen=True)
class Share:
    """A process's episodes of a part: `start` to below `stop` of `total`."""

    start: int
    stop: int
    total: int

    def __len__(self) -> int:
        return self.stop - self.start


def share_of(total: int, rank: int, world_size: int) -> Share:
    """The episodes of one rank: neighbours, in order, shares that differ by one at most."""
    if total < world_size:
        raise InputError(
            f"expected at least one episode for each of {world_size} workers, found {total} that share batch "
            "statistics: use fewer workers or a larger statistics_batch"
        )
    return Share(start=total * rank // world_size, stop=total * (rank + 1) // world_size, total=total)


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of all processes' episodes.

    "The episodes that share statistics" are the part, whoever computes them: `TrainingConfig.statistics_batch`
    says how many, so it, and not the number of workers, is what batch norm means. With statistics per worker,
    another number of workers would be another method. Shares may differ in size: every process counts by its
    number of positions. The running statistics are the same bits on all processes.

    One small collective forward (each process's mean, variance, count) and one backward (two sums per
    channel). Statistics are float32 for float32 and bfloat16 input, float64 for float64. In eval mode, and
    with one process, this is `nn.BatchNorm2d`, bit for bit.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    group: distributed.ProcessGroup | None = None
    """The processes that share the statistics; None: all."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same size; in training all processes must call it, in the same order."""
        if not self.training or rank_and_world()[1] == 1:
            return super().forward(x)
        normalised: Tensor = self._over_all_processes(x)
        return normalised

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled code goes from one collective to the next
    def _over_all_processes(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        normalised: Tensor
        normalised, mean, variance, count = _SharedBatchNorm.apply(x, self.weight, self.bias, self.eps, self.group)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)  # unbiased
        return normalised


class _SharedBatchNorm(torch.autograd.Function):
    """Normalise by the mean and variance over all processes; also returns these and the count of positions."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: distributed.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _shared_statistics(x, weight.dtype, group)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        """With y the normalised x: dx = weight / deviation * (grad - mean(grad) - y * mean(grad * y)).

        The means are over all processes. The gradients of weight and bias are this process's own, as every
        parameter's, to be summed with the others' by whoever does that.
        """
        x, weight, mean, variance, count = ctx.saved_tensors
        grad = grad.contiguous(memory_format=_memory_format(x))  # else torch's sums are bfloat16 where the input is
        inverse = torch.rsqrt(variance + ctx.eps)
        # In its eval mode torch's backward leaves the statistics alone and gives the two sums in one pass.
        _, along, total = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, ctx.eps, [False, True, True]
        )
        sums = torch.stack([along, total])
        with region("communication"):
            distributed.all_reduce(sums, group=ctx.group)
        mean_along, mean_grad = sums / count
        # dx = scale * grad + slope * x + offset: no temporary but the result.
        scale = weight * inverse
        slope = -scale * inverse * mean_along
        offset = -scale * mean_grad - slope * mean
        of_x = torch.addcmul(_per_channel(offset), x, _per_channel(slope))
        return of_x.addcmul_(grad, _per_channel(scale)).to(x.dtype), along, total, None, None


def _shared_statistics(
    x: Float[Tensor, "b c h w"], dtype: torch.dtype, group: distributed.ProcessGroup | None
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"], Float[Tensor, ""]]:
    """Mean, biased variance and count of positions over all processes: theirs, combined (Chan et al., 1979).

    From means and centred second moments, as sums of squares would lose a variance small beside the mean.
    """
    channels = x.shape[1]
    unused = x.new_zeros(2, channels, dtype=dtype)  # running statistics: they say which type is wanted
    mean, variance = torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
    own = torch.cat([mean, variance, mean.new_full((1,), x.numel() // channels)])
    everyones = own.new_empty(distributed.get_world_size(group) * len(own))
    with region("communication"):
        distributed.all_gather_into_tensor(everyones, own, group=group)
    means, variances, counts = everyones.view(-1, len(own)).split([channels, channels, 1], dim=1)
    count = counts.sum()
    weights = counts / count
    mean = (weights * means).sum(0)
    variance = (weights * (variances + (means - mean).square())).sum(0)
    return mean, variance, count


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _per_channel(values: Float[Tensor, " c"]) -> Float[Tensor, "1 c 1 1"]:
    return values[None, :, None, None]


def synchronise_batch_norm(module: nn.Module) -> None:
    """Replace every `nn.BatchNorm2d` below by a `BatchNorm2d` that holds the same parameters and buffers.

    To be called on all processes, after the process group was made and before the optimizer and DDP are.
    """
    group = _own_group()
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, _synchronised(child, group))


def _own_group() -> distributed.ProcessGroup | None:
    # gloo runs collectives on two threads: behind DDP's large ones, those of batch norm would wait. On nccl all
    # go through one stream in one order, which is what makes them safe.
    if rank_and_world()[1] > 1 and distributed.get_backend() == "gloo":
        return cast("distributed.ProcessGroup", distributed.new_group())
    return None


def _synchronised(norm: nn.BatchNorm2d, group: distributed.ProcessGroup | None) -> BatchNorm2d:
    with torch.device("meta"):
        shared = BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
    for name, parameter in norm.named_parameters():
        setattr(shared, name, parameter)
    for name, buffer in norm.named_buffers():
        setattr(shared, name, buffer)
    shared.group = group
    return shared.train(norm.training)


class ChannelDropout(nn.Module):
    """Dropout of whole channels, by an episode's place in its part.

    In training every process draws the masks of the whole part and takes those of its own share, so
    that an episode meets the same mask whoever computes it. Without a share the batch is the part:
    `nn.Dropout2d`, bit for bit.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.share: Share | None = None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same size; in training, channels are zero with probability p, else scaled by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return x
        total = self.share.total if self.share else len(x)
        kept = x.new_empty(total, x.shape[1], 1, 1).bernoulli_(1 - self.p).div_(1 - self.p)
        return x * (kept[self.share.start : self.share.stop] if self.share else kept)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def set_share(module: nn.Module, share: Share) -> None:
    """Tell every `ChannelDropout` below which episodes of the part are this process's."""
    for child in module.modules():
        if isinstance(child, ChannelDropout):
            child.share = share
