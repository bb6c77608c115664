"""Experiments beside maskft: the demo, studies, the search over layers and the loss landscape."""
