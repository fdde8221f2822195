"""The tasks that come with the program, by name."""

from minbert.data.task import resolve_task

TASKS = {name: resolve_task(name) for name in ("sst", "quora", "sts", "cfimdb")}
SST, QUORA, STS, CFIMDB = TASKS.values()
