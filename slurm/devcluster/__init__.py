"""A private SLURM cluster on this machine, for development and tests."""

from minbert.slurm.devcluster.cluster import DevCluster

__all__ = ["DevCluster"]
