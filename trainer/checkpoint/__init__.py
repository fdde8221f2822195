"""Checkpoints that resume anywhere: their format and its verification, what a process writes of the training state,
and how any number of processes reads it back. `format` is the way in, `saving` and `resuming` use it.
"""
