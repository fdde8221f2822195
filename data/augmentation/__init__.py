"""Back translation: training sentences into a pivot language and back, kept in shards, filtered, and put into rows.

`translators` finds a model, `round_trip` runs it through EasyNMT, `store` keeps what it gave, `work` shares the missing
out, `filters` drop what is no paraphrase, `rows` make a task's new rows of the rest, and `draw` lets training see them.
"""
