"""Every task's gradient of one backward pass is that of a backward pass of its own."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import small_model
import torch
from known_tasks import MLM, QUORA
from torch import Tensor, nn
from toy_objectives import ADVERSARIAL, masked

from minbert.data.batches.batch import Batch, Portion, make_batch
from minbert.data.sequences.masking import Masking
from minbert.data.sequences.ragged import Ragged, ends
from minbert.data.sequences.split import TokenisedSplit
from minbert.data.sequences.texts import RowNumbers, TextSplit
from minbert.trainer.model.bert import BertConfig
from minbert.trainer.model.multitask import MultitaskModel, head_part
from minbert.trainer.model.task_gradients import Place, TaskGradients, covers
from minbert.trainer.objectives.supervised import supervised
from minbert.trainer.options import EncoderConfig, HeadsConfig


def losses_of(model: MultitaskModel, batch: Batch, objective: Callable = supervised) -> dict[str, Tensor]:
    found = model(batch, objective)
    return {name: torch.dot(found[name], part.weights) for name, part in batch.tasks.items()}


def recorded(
    model: MultitaskModel,
    losses: Callable[[], dict[str, Tensor]],
    grouped: bool,
    passes: int = 1,
    groups: Sequence[tuple[str, ...]] = (),
):
    """{(task, parameter): gradient} of one backward pass for all tasks, or for groups of them, by their first tasks."""
    groups = groups or [(name,) for name in model.tasks]
    tasks, parts, order = [group[0] for group in groups], model.part_of, list[str]()
    shared = {name: not parts[name].startswith(head_part("")) for name in parts}
    widths, places = dict.fromkeys(model.parts, 0), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            places[id(parameter)] = Place(parts[name], widths[parts[name]], parameter.shape, shared[name])
            widths[parts[name]] += parameter.numel()
    trained = [part for part, width in widths.items() if width][::-1]

    def memory(part: str) -> Tensor:
        return torch.full((1 if part.startswith("heads.") else len(tasks), widths[part]), float("nan"))

    blocks: dict[str, Tensor] = {}
    recorder = TaskGradients(groups, places, trained, memory, grouped)
    for _ in range(passes):
        with recorder.recording(lambda part, block: (blocks.update({part: block}), order.append(part))[0]):
            total = sum(losses().values())
        total.backward()
        recorder.finish()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert order == trained * passes
    found = {}
    for name, parameter in model.named_parameters():
        if (place := places.get(id(parameter))) is not None:
            rows = enumerate(tasks) if place.is_shared else [(0, task) for task in model.tasks]
            for row, task in rows:
                if place.is_shared or place.part == head_part(task):
                    columns = blocks[place.part][row, place.start : place.start + parameter.numel()]
                    found[task, name] = columns.view_as(parameter)
    return found


def expected(model: MultitaskModel, losses: Callable[[], dict[str, Tensor]]) -> dict[tuple[str, str], Tensor]:
    """The same by autograd, with a backward pass for each task."""
    own = losses()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {}
    for task in model.tasks:
        gradients = torch.autograd.grad(own[task], parameters.values(), retain_graph=True, allow_unused=True)
        found |= {(task, name): gradient for name, gradient in zip(parameters, gradients)}
    return found


def assert_equal(found, wanted, tolerance: float) -> None:
    scale = dict.fromkeys((task for task, _ in wanted), 0.0)
    for (task, _), gradient in wanted.items():
        scale[task] = max(scale[task], 0.0 if gradient is None else float(gradient.abs().max()))
    for (task, name), gradient in wanted.items():
        if (task, name) in found:
            zero = torch.zeros_like(found[task, name])
            close = zero if gradient is None else gradient
            torch.testing.assert_close(
                found[task, name],
                close,
                atol=tolerance * scale[task],
                rtol=0,
                msg=lambda m: f"{task}, {name}: {m}",  # noqa: B023
            )
        else:
            assert gradient is None, (task, name)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("objective", [supervised, ADVERSARIAL, masked])
def test_one_pass_gives_what_one_for_each_task_does(grouped, objective):
    model, batch = small_model.build(), small_model.build_batch()
    assert covers(model)

    def losses():
        return losses_of(model, batch, objective)

    wanted = expected(model, losses)
    assert_equal(recorded(model, losses, grouped), wanted, 2e-6)
    twice = {key: None if gradient is None else 2 * gradient for key, gradient in wanted.items()}
    assert_equal(recorded(model, losses, grouped, passes=2), twice, 2e-6)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("objective", [supervised, ADVERSARIAL])
def test_a_group_of_tasks_has_the_gradient_of_their_sum(grouped, objective):
    """And each head its own."""
    model, batch = small_model.build(), small_model.build_batch()

    def losses():
        return losses_of(model, batch, objective)

    wanted, (first, second) = expected(model, losses), model.tasks
    found = recorded(model, losses, grouped, groups=[(first, second)])
    shared = [name for task, name in found if name.startswith("bert.")]
    summed = {
        (first, name): sum(filter(torch.is_tensor, (wanted[first, name], wanted[second, name]))) for name in shared
    }
    heads = {key: gradient for key, gradient in wanted.items() if key[1].startswith(f"heads.{key[0]}.")}
    assert found.keys() == (summed | heads).keys()
    assert_equal(found, summed | heads, 2e-6)


@pytest.mark.parametrize("grouped", [False, True])
def test_products_of_bf16_are_summed_in_fp32(grouped):
    """Both ways, the gradients differ from those of fp32 by the rounding of what is multiplied."""
    model, batch = small_model.build(), small_model.build_batch()
    wanted = expected(model, lambda: losses_of(model, batch))
    model.low_precision = True
    low = expected(model, lambda: losses_of(model, batch))
    found = recorded(model, lambda: losses_of(model, batch), grouped)
    assert_equal(found, low, 0.01)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert any(not torch.equal(gradient, wanted[key]) for key, gradient in found.items())
    twice = recorded(model, lambda: losses_of(model, batch), grouped, passes=2)
    assert_equal(twice, {key: 2 * gradient for key, gradient in found.items()}, 2e-6)


@pytest.mark.parametrize("grouped", [False, True])
def test_padding_and_tied_embeddings(grouped):
    """The row of the padding token learns nothing where it is looked up, and something where it is a score's."""
    model, mask = small_model.build(tasks=[MLM, QUORA]), 4
    generator, lengths = np.random.default_rng(0), [9, 5, 7]
    ids = [Ragged(generator.integers(5, 50, sum(lengths)), ends([np.array(lengths)])) for _ in range(3)]
    masking = Masking(mask, np.arange(50) < 5, np.zeros(50, bool), share=0.3)
    text = TextSplit(RowNumbers(3), (ids[0],), None, masking=masking, digest="")
    pairs = TokenisedSplit(["0", "1", "2"], tuple(ids[1:]), np.array([1.0, 0.0, 1.0], np.float32))
    batch = make_batch({"mlm": text, "quora": pairs}, dict.fromkeys(("mlm", "quora"), Portion.whole(np.arange(3))))
    batch.sentences.input_ids[::4] = 0

    def losses():
        return losses_of(model, batch)

    found, wanted = recorded(model, losses, grouped), expected(model, losses)
    assert_equal(found, wanted, 2e-6)
    row = found["quora", "bert.embeddings.word.weight"][0]
    assert row.abs().sum() == 0 < found["mlm", "bert.embeddings.word.weight"][0].abs().sum()


def test_frozen_parts_keep_nothing():
    model, batch = small_model.build(), small_model.build_batch()
    for name in ("embeddings", "layer 0"):
        model.bert.parts[name].requires_grad_(False)
    found = recorded(model, lambda: losses_of(model, batch), False)
    assert_equal(found, expected(model, lambda: losses_of(model, batch)), 2e-6)
    assert not any(name.startswith(("bert.embeddings", "bert.layers.0")) for _, name in found)


def test_a_layer_whose_rows_nobody_tells_apart_is_refused():
    model, batch = small_model.build(), small_model.build_batch()
    recorder = TaskGradients([(name,) for name in model.tasks], {}, [], lambda part: torch.zeros(0), False)
    with recorder.recording(lambda part, block: None), pytest.raises(RuntimeError, match="from within `Forward`"):
        model.bert(batch.sentences)


def test_other_layers_are_left_to_one_pass_for_each_task():
    shape = BertConfig(**small_model.SHAPE)
    model = MultitaskModel([small_model.SST], shape, EncoderConfig(), HeadsConfig())
    assert covers(model)
    model.heads["sst"].layers.append(nn.Linear(5, 5))
    assert not covers(model)
