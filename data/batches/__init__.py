"""Which examples make up a step (`plan`), and the batch that is made of them (`batch`): one matrix of all their tokens,
with all that attention must know of where they lie (`layout`).
"""
