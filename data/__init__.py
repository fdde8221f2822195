"""Tasks and their data: declarations, readers, tokenised cache, batches and the plan that orders them."""
