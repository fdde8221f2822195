"""Gradient surgery: from the gradients of several tasks to one update. `methods` turns losses or a Gramian into
weights, `combination` makes Gramians of shards and combines them, `conflicts` tells what they show.
"""
