"""The layers that work on a matrix row by row: linear, layer norm, embedding.

Each is PyTorch's own, until a `TaskGradients` is recording. Then its backward pass gives the gradient of its input to
autograd, and those of its weights, task by task, to the recording.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minbert.trainer.model.linear import linear as plain_linear
from minbert.trainer.model.linear import multiply
from minbert.trainer.model.task_gradients import PerTask, Rows, TaskGradients, recording_of


class Linear(nn.Linear, PerTask):
    """torch.nn.Linear for (N, in) inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm, PerTask):
    """torch.nn.LayerNorm for (N, n) inputs."""

    def forward(self, x: Tensor) -> Tensor:
        recording = recording_of(self.weight)
        if recording is None:
            return super().forward(x)
        call = _Call.of(recording, self.weight, self.bias)
        x = x if _lowered(x) is None else x.float()
        return _Norm.apply(x, recording.anchor, call, self.eps)


class Embedding(nn.Embedding, PerTask):
    """torch.nn.Embedding for ids (N,)."""

    def forward(self, input: Tensor) -> Tensor:
        recording = recording_of(self.weight)
        if recording is None:
            return super().forward(input)
        assert isinstance(self.weight, nn.Parameter)
        return _Lookup.apply(input, recording.anchor, _Call.of(recording, self.weight), self.padding_idx)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b for (N, in) inputs."""
    recording = recording_of(weight)
    if recording is None:
        return plain_linear(x, weight, bias)
    assert isinstance(weight, nn.Parameter)
    if (low := _lowered(x)) is not None:
        x, bias = x.to(low), bias if isinstance(bias, nn.Parameter) or bias is None else bias.to(low)
    if isinstance(bias, nn.Parameter):
        return _Linear.apply(x, None, recording.anchor, _Call.of(recording, weight, bias))
    return _Linear.apply(x, bias, recording.anchor, _Call.of(recording, weight))


def _lowered(x: Tensor) -> torch.dtype | None:
    """What autocast lowers the arithmetic on a tensor's device to, if it does."""
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def whole(parameter: nn.Parameter) -> Tensor:
    """A parameter that is used as it is, by whatever operation, with rows of one task."""
    recording = recording_of(parameter)
    return parameter if recording is None else _Whole.apply(recording.anchor, _Call.of(recording, parameter))


@dataclass(frozen=True)
class _Call:
    """A call of a layer that is recorded: its parameters, and the rows that it works on.

    Autograd doesn't get to see the parameters, and holds no copy of them: at stage 3, they are gathered when the
    backward pass comes to their module.
    """

    recording: TaskGradients
    rows: Rows
    weight: nn.Parameter
    bias: nn.Parameter | None

    @staticmethod
    def of(recording: TaskGradients, weight: nn.Parameter, bias: nn.Parameter | None = None) -> "_Call":
        assert recording.rows is not None
        recording.expect(weight, bias)
        return _Call(recording, recording.rows, weight, bias)

    def done(self) -> None:
        self.recording.done(self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, anchor: Tensor, call: _Call) -> Tensor:
        ctx.save_for_backward(x)
        ctx.call = call
        added = bias if call.bias is None else call.bias.to(x.dtype)
        return multiply(x, call.weight.to(x.dtype), added)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), call = ctx.saved_tensors, ctx.call
        dx = multiply(dy, call.weight.to(dy.dtype).T) if ctx.needs_input_grad[0] else None
        call.recording.products(call.weight, dy, x, call.rows)
        call.recording.sums(call.bias, dy, call.rows)
        call.done()
        return dx, dy.sum(0) if ctx.needs_input_grad[1] else None, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, call: _Call, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, call.weight.shape, call.weight, call.bias, eps)
        ctx.save_for_backward(x, mean, rstd)
        ctx.call, ctx.eps = call, eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, mean, rstd), call = ctx.saved_tensors, ctx.call
        arguments = dy, x, list(call.weight.shape), mean, rstd, call.weight, call.bias
        dx = (
            torch.ops.aten.native_layer_norm_backward(*arguments, [True, False, False])[0]
            if ctx.needs_input_grad[0]
            else None
        )
        call.recording.norms(call.weight, call.bias, dy, x, mean, rstd, ctx.eps, call.rows)
        call.done()
        return dx, None, None, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, anchor: Tensor, call: _Call, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.call, ctx.padding = call, padding
        return F.embedding(ids, call.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        (ids,), call = ctx.saved_tensors, ctx.call
        call.recording.lookups(call.weight, dy, ids, ctx.padding, call.rows)
        call.done()
        return None, None, None, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        return call.weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.call.recording.take(ctx.call.weight, gradient, ctx.call.rows)
        ctx.call.done()
        return None, None
