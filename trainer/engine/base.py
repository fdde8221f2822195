"""The wrapped model and optimizer: plain PyTorch, data parallel, or DeepSpeed ZeRO, behind the same few verbs.

Accelerate prepares all of them. The training step asks an engine for outputs, for a backward pass, for the gradient
that this left, reduced over the processes and cut as the back end cuts it, and for an update with a gradient that it
hands back. So whatever is done to gradients is written once, for every number of processes and every ZeRO stage.
"""

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minbert.data.batches.batch import Batch
from minbert.trainer.config import RunConfig
from minbert.trainer.engine.copies import AVERAGE, swap
from minbert.trainer.engine.one_backward import OneBackward
from minbert.trainer.engine.optimizer import MOMENTS, adam_state
from minbert.trainer.engine.parts import Block, Gradient, Part, Shard
from minbert.trainer.model.multitask import MultitaskModel
from minbert.trainer.model.task_gradients import covers
from minbert.trainer.processes.world import World, world_size

SMALLEST_BUCKET, LARGEST_BUCKET = 1 << 20, 1 << 27  # elements that DeepSpeed reduces together


def build_accelerator(config: RunConfig, world: World, **kwargs: Any) -> Accelerator:
    """Accelerate's view of this run. `kwargs` go to Accelerator (trackers)."""
    _leave_out_dtensors()
    if config.parallel.zero_stage is None:
        return Accelerator(cpu=world.device.type == "cpu", **kwargs)
    plugin = _Plugin(hf_ds_config=deepspeed_config(config.parallel.zero_stage))
    _leave_out_muon()
    if world.device.type == "cpu":
        # On a CPU, Accelerate either sees the other processes (cpu=True) or DeepSpeed. The state of the processes is
        # its own object, so it can be set up with the one before the accelerator is with the other.
        PartialState(cpu=True)
        _do_not_compile()
    return Accelerator(deepspeed_plugin=plugin, **kwargs)


class _Plugin(DeepSpeedPlugin):
    """Accelerate's view of DeepSpeed's configuration. It is not told to transformers, which would shard its own models
    as it loads them: none is loaded here, and importing it takes a second of every process."""

    def set_deepspeed_weakref(self) -> None:
        pass


def _leave_out_dtensors() -> None:
    """Keep Accelerate from looking for PyTorch's distributed tensors, which take most of a second to import: no model
    here has any."""
    from accelerate import accelerator

    accelerator.model_has_dtensor = lambda model: False


def _leave_out_muon() -> None:
    """Keep DeepSpeed from preparing to compile its optimizer Muon, which it imports and nobody uses: torch's compiler
    takes another second to import."""
    from deepspeed.runtime import compiler

    compiler.compile = lambda: compiler.dummy_decorator


def _do_not_compile() -> None:
    """Keep DeepSpeed from compiling its shared-memory operator, which only inference uses: it takes a compiler and a
    minute, and prints."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def deepspeed_config(stage: int) -> dict:
    """DeepSpeed's configuration. Batches are cut, accumulated and scaled by the training step and gradients are clipped
    there, so DeepSpeed is told of single micro-batches; arithmetic stays fp32 for it, as the model lowers its own."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # its own default is 1.0
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }


def build_engine(accelerator: Accelerator, model: MultitaskModel, optimizer: torch.optim.Optimizer) -> "Engine":
    """The engine for what Accelerate was set up for."""
    assert accelerator.num_processes == world_size(), "Accelerate does not see all processes"
    plugin = accelerator.state.deepspeed_plugin
    stage = plugin.zero_stage if plugin else None
    if plugin:
        # DeepSpeed reduces in a buffer of so many elements, whatever the model needs: by default 2 GB. Where gradients
        # are reduced here it is of no use.
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        bucket = SMALLEST_BUCKET if covers(model) else min(trained, LARGEST_BUCKET)
        plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] = bucket
    if stage is None:  # what its gradients go through is wrapped around the model where they need it
        prepared_model = accelerator.prepare_model(model, evaluation_mode=True)
        return Engine(accelerator, prepared_model, accelerator.prepare_optimizer(optimizer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        prepared = accelerator.prepare(model, optimizer)
    from minbert.trainer.engine.zero import Zero3Engine, ZeroEngine, ZeroStage0Engine

    return {0: ZeroStage0Engine, 1: ZeroEngine, 2: ZeroEngine, 3: Zero3Engine}[stage](accelerator, *prepared)


class Engine:
    """Plain PyTorch on one process, or data parallel on several: every process holds the whole gradient."""

    is_sharded = False
    adds_up_whole = True  # whether gradients are whole until an accumulated batch is through, and then reduced once
    needs_wrapper = False  # whether the model computes nothing without it

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any):
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.part_of = self.module.part_of
        trained = {self.part_of[name] for name in self.parameters}
        self.shared_parts = tuple(part for part in self.module.bert.parts if part in trained)
        self.shards: list[Shard] = self._shards()
        self.peak_rates: dict[str, float] = {group["name"]: group["lr"] for group in optimizer.param_groups}
        self._rates: Mapping[str, float] = {}  # of the update under way
        self._is_unwrapped = False
        self.copies: tuple[str, ...] = ()  # names of the copies of the weights that are kept
        self.torch_optimizer.register_step_pre_hook(self._leave_out)

    @property
    def module(self) -> MultitaskModel:
        """The model itself, without its wrapper. At stage 3 its parameters are shards outside of its modules."""
        wrapper: Any = self.model
        return wrapper if isinstance(wrapper, MultitaskModel) else wrapper.module

    def __call__(self, batch: Batch, *arguments: Any) -> dict[str, Tensor]:
        """As `MultitaskModel.forward`."""
        return (self.module if self._is_unwrapped else self.model)(batch, *arguments)

    def task_gradients(
        self,
        groups: Sequence[Collection[str]],
        losses: Callable[[int], Mapping[str, Tensor]],
        parts: int,
        trained: Collection[str],
    ) -> list[Block]:
        """The gradients of groups of tasks at once, as `OneBackward` makes them; for a model that it `covers`."""
        return self._one_backward(groups, losses, parts, trained)

    @cached_property
    def _one_backward(self) -> OneBackward:
        return OneBackward(self)

    @contextlib.contextmanager
    def unwrapped(self) -> Iterator[None]:
        """Inside, the model is called without its wrapper and what that does about gradients."""
        self._is_unwrapped = not self.needs_wrapper
        try:
            yield
        finally:
            self._is_unwrapped = False

    def backward_alone(self, loss: Tensor) -> None:
        """A backward pass that leaves no gradient at the parameters, and in which no other process has a part."""
        loss.backward()

    def gradients(self, losses: Sequence[Callable[[int], Tensor]], parts: int) -> list[Gradient]:
        """One gradient for each of several losses, reduced over the processes, in the order of `shards`.

        A loss is the sum over `parts` of what it returns for each, and over the processes. It makes a forward pass of
        its own each time: one backward pass follows it, as DeepSpeed's stage 3 takes no graph twice.
        """
        if self.accelerator.num_processes > 1 and self.model is self.module:
            # A pass may be for a single task, and leave the other tasks' heads without a gradient.
            self.model = DistributedDataParallel(self.model, find_unused_parameters=True)
        found = []
        for loss in losses:
            for part in range(parts):
                last = part == parts - 1
                with self.accumulating(last):
                    # Processes average their gradients; what they hold are parts of a sum.
                    self.backward(loss(part) * self.accelerator.num_processes, last)
            found.append(self.collect_gradient())
        return found

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """Context of one of several forward and backward passes that add up; the `last` one reduces."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss`; the `last` pass averages the sum over the processes."""
        loss.backward()

    def collect_gradient(self) -> Gradient:
        """The reduced gradient since the last call, in the order of `shards`; the engine forgets it."""
        gradient = [parameter.grad for parameter in self.parameters.values()]
        for parameter in self.parameters.values():
            parameter.grad = None
        return gradient

    def update(self, gradient: Gradient, rates: Mapping[str, float], finite: Tensor) -> None:
        """One optimizer step with this gradient, at the learning rate of each part of the model.

        A part at rate zero, or without one, stays as it is: no weight decay, and neither moments nor their bias
        correction move. So does everything where `finite`, a () bool on the device, is false.
        """
        if self.torch_optimizer.defaults.get("fused"):
            # As for a scaler of fp16 gradients: where it is not zero, the fused kernel changes nothing.
            self.torch_optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        elif not finite:
            return
        self._rates = rates
        for group in self.optimizer.param_groups:
            group["lr"] = rates.get(group["name"], 0.0)
        self._hand_back(gradient)
        self._step()

    def _hand_back(self, gradient: Gradient) -> None:
        """Put the gradient where the optimizer finds it. Parameters without one get zeros, as a flat shard has them."""
        for parameter, part in zip(self.parameters.values(), gradient, strict=True):
            parameter.grad = torch.zeros_like(parameter) if part is None else part.view_as(parameter)

    def _leave_out(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before the optimizer's step: it passes over what has no gradient. DeepSpeed calls it once for each group."""
        for group in optimizer.param_groups:
            if not self._rates.get(group["name"]):
                for parameter in group["params"]:
                    parameter.grad = None

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """The sum over the whole gradient of what each process computed from its shards; identical on all."""
        if self.is_sharded and self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(value)
        return value

    def fix_below(self, rates: Mapping[str, float]) -> None:
        """Let the backward passes to come end at the lowest part of the encoder that has a rate."""
        bert = self.module.bert
        bert.fixed = next((number for number, part in enumerate(bert.parts) if rates.get(part)), len(bert.parts))

    def train(self) -> None:
        self.model.train()

    def eval(self) -> None:
        self.model.eval()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, with the averaged weights in place of the trained ones if there are any. Collective."""
        self.eval()
        with self.exchanged(AVERAGE) if AVERAGE in self.copies else contextlib.nullcontext():
            yield
        self.train()

    def keep_copy(self, name: str) -> None:
        """Keep a copy of the trained weights as they are now under this name, in place of an earlier one.

        It lies beside the optimizer's moments and is cut, saved and resumed like them. What is frozen needs none.
        """
        for _, tensor in self._optimized():
            state = adam_state(self.torch_optimizer, tensor)
            state[name] = tensor.detach().clone() if name not in state else state[name].copy_(tensor.detach())
        self.copies = tuple(dict.fromkeys((*self.copies, name)))

    @torch.no_grad()
    def move_copy(self, name: str, decay: float, finite: Tensor) -> None:
        """copy <- decay * copy + (1 - decay) * weights; or nothing, as in `update`."""
        weights = [tensor.detach() for _, tensor in self._optimized()]
        share = finite * (1.0 - decay)
        torch._foreach_lerp_(self._copy(name), weights, [share] * len(weights))

    @contextlib.contextmanager
    def exchanged(self, name: str) -> Iterator[None]:
        """Inside, the model computes with the copy `name`, and the weights are kept where that was. Collective.

        They are exchanged in place: no process holds a third copy of what it holds. If an exception leaves it, what
        this process holds is put back, but not what the others must help to gather: they may not come.
        """
        self._exchange(name)
        self._refresh_parameters()
        try:
            yield
        except BaseException:
            self._exchange(name)
            raise
        self._exchange(name)
        self._refresh_parameters()

    def _exchange(self, name: str) -> None:
        for (_, tensor), copy in zip(self._optimized(), self._copy(name), strict=True):
            swap(tensor.detach(), copy)

    def _copy(self, name: str) -> list[Tensor]:
        return [adam_state(self.torch_optimizer, tensor)[name] for _, tensor in self._optimized()]

    def full_state(self) -> dict[str, Tensor]:
        """Every parameter, whole and on the CPU, on rank 0; an empty dictionary elsewhere. Collective.

        Shards are gathered one parameter at a time, so no process ever holds a second copy of the model on its device.
        """
        state = {}
        for name, parameter in self.module.named_parameters():
            with self._gathered(parameter):
                if self.accelerator.is_main_process:
                    state[name] = parameter.detach().cpu().clone()
        return state

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of every parameter, whole."""
        # DeepSpeed's stage 3 leaves an empty parameter behind, and its shape in `ds_shape`.
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self.module.named_parameters()}

    def parts(self) -> list[Part]:
        """What this process holds of the training state: fp32 weights, as the optimizer has them, moments, copies."""
        return [
            Part(name, 0, self._flat(parameter), replicated=True) for name, parameter in self.module.named_parameters()
        ]

    def updates(self) -> dict[str, int]:
        """How many updates each of the optimizer's groups has had."""
        return {name: int(adam_state(self.torch_optimizer, tensor)["step"]) for name, tensor in self._optimized()}

    def adopt_parts(self, updates: Mapping[str, int]) -> None:
        """Go on from what was written into `parts`, after so many `updates` of each group. Collective."""
        for name, tensor in self._optimized():
            adam_state(self.torch_optimizer, tensor)["step"].fill_(updates[name])
        self._refresh_parameters()

    def _refresh_parameters(self) -> None:
        """Make the model's parameters those that the optimizer works on, where they are others. Collective."""

    def _optimized(self) -> list[tuple[str, Tensor]]:
        """What the optimizer works on, each with the name of its group."""
        return [(group["name"], tensor) for group in self.torch_optimizer.param_groups for tensor in group["params"]]

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """PyTorch's own optimizer, which holds the moments."""
        return self.optimizer.optimizer

    def _flat(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter and, if it is trained, its moments and copies, as flat views."""
        tensors = {"weight": parameter.detach().view(-1)}
        if parameter.requires_grad:
            state = adam_state(self.torch_optimizer, parameter)
            tensors |= {kind: state[kind].view(-1) for kind in (*MOMENTS, *self.copies)}
        return tensors

    def _shards(self) -> list[Shard]:
        return [self._shard(name, 0, parameter.numel()) for name, parameter in self.parameters.items()]

    def _shard(self, name: str, start: int, length: int) -> Shard:
        part = self.part_of[name]
        return Shard(name, start, length, part, part in self.shared_parts)

    def _step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _gathered(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


def gradient_norm(engine: Engine, gradient: Sequence[Tensor | None]) -> Tensor:
    """Euclidean norm () of a gradient over all shards, float64. Collective."""
    parts = [part for part in gradient if part is not None and part.numel()]
    device = engine.accelerator.device
    squares = torch.zeros((), dtype=torch.float64, device=device)
    if parts:
        squares = torch.stack(torch._foreach_norm(parts)).double().square().sum()
    return engine.sum_over_shards(squares).sqrt()
