"""Compiled graphs: how they are described, opened, bound and run. No torch, no knowledge of diffusion."""
