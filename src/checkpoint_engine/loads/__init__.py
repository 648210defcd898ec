"""Recorded loads: what an engine's loader copies where, learned once, proved once, and replayed without the loader."""
