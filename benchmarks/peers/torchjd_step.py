"""Gradient surgery by torchjd, on this project's own model and batches, so that only the surgery differs: its
`mtl_backward`, and its autogram engine, which computes the Gramian without the Jacobian."""

import contextlib

import torch
from torch import Tensor
from turns import Skipped, Step


def training(run, config, way: str) -> Step:
    """`way`: mtl_backward or autogram. The method is the run's aggregator."""
    from minbert.data.batches.batch import Portion, make_batch
    from minbert.trainer.assembly import assemble_engine
    from minbert.trainer.model.multitask import Forward
    from minbert.trainer.objectives.supervised import supervised
    from minbert.trainer.processes import world as distributed
    from minbert.trainer.run.data import build_plan, load_splits

    world = distributed.start(config.parallel)
    splits = load_splits(config, run, "train")
    plan = build_plan(config, splits)
    engine = assemble_engine(config, run, world, pretrained=True)
    model, optimizer = engine.module, torch.optim.AdamW(engine.module.parameters(), lr=config.optimizer.lr, fused=True)
    shared = [parameter for parameter in model.bert.parameters() if parameter.requires_grad]
    backward = {"mtl_backward": _mtl_backward, "autogram": _autogram}[way](config.batch.aggregator, model, shared)

    def step(number: int) -> int:
        portions = {name: Portion.whole(plan.rows(name, number)) for name in splits}
        batch = make_batch(splits, portions, draw=(plan.seed, number)).to(world.device)
        forward = Forward(model, batch, number)
        losses = [loss.mean() for loss in supervised(forward).values()]
        backward(forward, losses)
        optimizer.step()
        optimizer.zero_grad()
        return batch.tokens

    return step


def _mtl_backward(method: str, model, shared: list[Tensor]):
    from torchjd import autojac
    from torchjd.aggregation import PCGrad, UPGrad

    aggregator = {"pcgrad": PCGrad, "upgrad": UPGrad}[method]()

    def backward(forward, losses: list[Tensor]) -> None:
        heads = [list(model.heads[name].parameters()) for name in forward.batch.tasks]
        features = list(forward.pooled.values())
        # A chunk of one avoids vmap, for which the oneDNN linear layers have no rule.
        autojac.mtl_backward(losses, features=features, tasks_params=heads, shared_params=shared, parallel_chunk_size=1)
        autojac.jac_to_grad(shared, aggregator)

    return backward


def _autogram(method: str, model, shared: list[Tensor]):
    """As its documentation has it: the Gramian of the losses, weights of that, and one backward pass of the weighted
    sum. It always computes under vmap, so the linear layers are PyTorch's."""
    from torchjd.aggregation import PCGradWeighting, UPGradWeighting
    from torchjd.autogram import Engine

    from minbert.trainer.model import linear

    linear._AVAILABLE = False
    weighting = {"pcgrad": PCGradWeighting, "upgrad": UPGradWeighting}[method]()
    engine = Engine(model.bert.embeddings, *model.bert.layers, batch_dim=None)

    def backward(forward, losses: list[Tensor]) -> None:
        stacked = torch.stack(losses)
        with _unsupported():
            weights = weighting(engine.compute_gramian(stacked))
        stacked.backward(weights)

    return backward


@contextlib.contextmanager
def _unsupported():
    try:
        yield
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        raise Skipped(f"torchjd's autogram engine cannot do this model: {str(error).splitlines()[0]}") from error
