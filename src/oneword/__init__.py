"""Textual inversion compiled once: learned words are inputs of the engine, never part of it.

Four floors, each importing only those below it: `oneword.train` (images -> a concept), `oneword.export` (a model -> a
bundle), `oneword.runtime` (bundle + concepts + requests -> pictures, without torch) and `oneword.engines` (a compiled
graph: open it, run it, also without torch). The miniature model travels beside this file, in `miniature/`.
"""

__version__ = "0.1.0"
