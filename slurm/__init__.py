"""SLURM: what it takes to run there, and a private cluster to try it on."""
