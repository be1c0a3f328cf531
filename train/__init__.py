"""Learns words from pictures, with PyTorch and diffusers. Writes concept files, which the runtime draws."""
