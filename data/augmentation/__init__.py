"""Back translation: training sentences into a pivot language and back, kept in shards, filtered, and put into rows.

`round_trip` finds a model (`apertium`, `neural`) and runs it through EasyNMT, `store` keeps what it gave, `work` shares
out what is missing, `filters` and `selection` drop what is no paraphrase, `rows` make a task's new rows of the rest,
and `augmented` lets training see them.
"""
