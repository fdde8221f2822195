"""The model: minBERT from its parts, the heads of the tasks, and weights on disk. `multitask` is the way in: one
encoder, one head per task, one forward pass.
"""
