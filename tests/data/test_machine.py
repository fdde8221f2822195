"""What a machine says of itself, from files like those of other machines."""

import pytest

from minbert.data.machine import bf16_units, cgroup_limit


@pytest.mark.parametrize(
    ("flags", "unit"),
    [
        ("fpu avx2 avx512f", None),
        ("fpu avx512_bf16 avx512f", "avx512_bf16"),
        ("avx512_bf16 amx_bf16", "amx_bf16"),
        ("fp asimd bf16", "bf16"),
    ],
)
def test_what_multiplies_bf16(tmp_path, flags, unit):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\n")
    assert bf16_units(cpuinfo) == unit


def test_the_tightest_cgroup_limit_counts(tmp_path):
    proc = tmp_path / "cgroup"
    assert cgroup_limit(proc, tmp_path) == float("inf")
    proc.write_text("0::/slurm/job_1\n")
    (tmp_path / "slurm/job_1").mkdir(parents=True)
    (tmp_path / "slurm/job_1/memory.max").write_text("max\n")
    (tmp_path / "slurm/memory.max").write_text("4096\n")
    assert cgroup_limit(proc, tmp_path) == 4096
    proc.write_text("5:cpu:/\n4:memory:/job\n0::/\n")
    (tmp_path / "memory/job").mkdir(parents=True)
    (tmp_path / "memory/job/memory.limit_in_bytes").write_text("2048\n")
    assert cgroup_limit(proc, tmp_path) == 2048
