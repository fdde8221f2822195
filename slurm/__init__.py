"""Starting a run on a SLURM cluster, and keeping it alive there; knows nothing of how a run trains."""
