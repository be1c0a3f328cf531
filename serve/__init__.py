"""The server: HTTP requests of many users become requests of one runtime, and its events become answers. No PyTorch."""
