"""The commands, and the processes they start: the only place that knows all the others."""
