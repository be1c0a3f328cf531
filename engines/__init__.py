"""Engines: a compiled graph is opened, described and run here. No torch."""
