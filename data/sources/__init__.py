"""Where the rows of a task come from: the course's files, a user's own, the hub, or a generated corpus.
`loading.load_examples` is the way in; every source ends in the same checks (`examples`).
"""
