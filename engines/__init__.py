"""Compiled graphs: what a bundle holds, how a graph is opened, bound and run. No torch, no knowledge of diffusion."""
