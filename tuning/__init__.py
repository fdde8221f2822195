"""Search and ablation: which runs to make, when to stop them, and what they show; knows nothing of how a run trains."""
