"""This process among the others: its rank and device (`world`, the way in), messages beside the collectives,
requests to stop, and random streams.
"""
