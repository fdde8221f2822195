"""What a training step minimises: one file per objective.

An objective is called with a `Forward` (`trainer/model.py`) inside the wrapped model, and returns for each task the
losses of its batch's examples, (B,). The step weighs and sums them, so gradient surgery sees one loss per task whatever
is in it. `supervised` is the way in.
"""
