"""Random streams: no two uses of random numbers share any."""

from itertools import product

from minbert.launch.options import parse_run_config
from minbert.trainer import assembly
from minbert.trainer.processes.random_state import stream
from minbert.trainer.run.preparation import prepare
from minbert.trainer.train import train


def test_every_use_has_a_stream_of_its_own():
    keys = [(seed, "weights") for seed in range(50)]
    keys += list(product(range(50), ["dropout", "aggregator"], range(50)))
    keys += list(product(range(50), ["dropout"], range(5), range(5)))
    found = [stream(*key) for key in keys]
    assert all(0 <= one < 2**63 for one in found)
    assert len({one % 2**32 for one in found}) == len(keys)  # PyTorch's generator for the CPU takes no more than that
    assert stream(3, "dropout", 1) == stream(3, "dropout", 1)


def test_weights_and_dropout_of_neighbouring_seeds_differ(tmp_path, monkeypatch):
    seeds, original = [], assembly.seed_everything
    monkeypatch.setattr(assembly, "seed_everything", lambda seed: (seeds.append(seed), original(seed)))
    for seed in range(2):
        text = f"--train-limit 20 --eval-limit 10 --batch-size 4 --steps 1 --seed {seed} --trackers"
        train(prepare(parse_run_config([*text.split(), "--run", str(tmp_path / str(seed))])))
    assert len(seeds) == len(set(seeds)) == 4
