"""The tasks that come with the program, by name, and a masked language model of their texts."""

from minbert.data.task import resolve_task

TASKS = {name: resolve_task(name) for name in ("sst", "quora", "sts", "cfimdb")}
SST, QUORA, STS, CFIMDB = TASKS.values()
MLM = resolve_task({"name": "mlm", "kind": "masked_lm", "texts": {"tasks": ["sst", "quora", "sts"]}})
# Losses that compare the examples of a batch.
COSENT, PEARSON = (STS.model_copy(update={"loss": loss}) for loss in ("cosent", "pearson"))
