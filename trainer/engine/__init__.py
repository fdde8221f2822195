"""Model and optimizer behind a few verbs, plain, data parallel or sharded by DeepSpeed ZeRO. `base` is the way in;
`parts` are what a process holds, `optimizer` the groups and rates, `one_backward` the gradients of all tasks at once.
"""
