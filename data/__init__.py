"""Tasks and their data. A task is a declaration (`task`); `sources` has its rows, `sequences` makes tokens of them,
`batches` what a step sees, and `augmentation` new rows of old ones. Errors and the writing of files are everybody's.
"""
