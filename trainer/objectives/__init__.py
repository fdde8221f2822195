"""What a training step minimises: one file per objective; `supervised` is the way in.

An objective is called with a `Forward` (`minbert.trainer.model.multitask`) inside the wrapped model, and returns for
each task the losses of its batch's examples, (B,). The step weighs and sums them, so that gradient surgery sees one
loss per task whatever is in it.
"""
