"""minBERT, its heads, and the training of them: one process or many, one step that reads like the method."""
