"""A run on disk: its folder, what is prepared there before the processes start, its data and budget, what it saves,
what a person and trackers see of it, and its trained model. `folder` is the way in.
"""
