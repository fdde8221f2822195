"""What the machine can do at best: one large matrix product after another, in the precision of the sides. Its work are
floating-point operations."""

from turns import Step

SECONDS = 0.2  # of a step


def peak(run, config) -> Step:
    """The product that a run compares itself with."""
    from minbert.trainer.processes.world import pick_device
    from minbert.trainer.run.speed import Product, arithmetic

    product = Product(pick_device(config.parallel), arithmetic(config.parallel))
    product(2)
    times = max(1, round(SECONDS / (product(5) / 5)))

    def step(_: int) -> float:
        product(times)
        return times * product.flops

    return step
