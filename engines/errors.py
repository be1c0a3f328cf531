"""The exception hierarchy.

A message is one line: what was given, what is allowed, how to fix it.

OnewordError            exit status 1
├── UsageError          exit status 2: the command or call requests something that does not exist
│   └── FeedError       an array passed to an engine has a wrong name, dtype or shape
├── FileError           a file cannot be read or written, or is not what it should be
│   ├── BundleError     a bundle is broken, incomplete, changed, or of another version
│   └── ConceptError    an embedding file is refused
├── MissingPackage      an optional package is not installed; the message carries the pip line
└── EngineError         a graph could not be opened or failed while it ran
    └── NotFinite       a graph produced NaN or infinity

Also the parts that messages are made of.
"""

from collections.abc import Iterable


class OnewordError(Exception):
    """The root: catch it to catch everything that `oneword` raises on purpose."""

    exit_code = 1


class UsageError(OnewordError):
    """The request itself is wrong, regardless of the files and the machine."""

    exit_code = 2


class FeedError(UsageError):
    """An array passed to an engine has a wrong name, dtype or shape."""


class FileError(OnewordError):
    """A file cannot be read or written, or is not what it should be."""


class BundleError(FileError):
    """A bundle is broken, incomplete, changed since it was written, or of another format version."""


class ConceptError(FileError):
    """An embedding file is refused: unsafe, malformed, or made for another model."""


class MissingPackage(OnewordError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: {pip_line(extra)}")
        self.package = package
        self.extra = extra


def pip_line(extra: str) -> str:
    """How to install one of oneword's extras, which is not on PyPI."""
    return f"in a checkout of oneword, pip install -c constraints.txt -e '.[{extra}]'"


class EngineError(OnewordError):
    """A graph could not be opened, or failed while it ran."""


class NotFinite(EngineError):
    """A graph produced NaN or infinity; the message names the graph and the rows."""


def not_imported(package: str, extra: str, error: ImportError) -> OnewordError:
    """What to raise if an optional package cannot be imported: MissingPackage if it, or one that it needs, is not
    installed; else EngineError with the reason, such as a shared library that is missing."""
    if isinstance(error, ModuleNotFoundError):
        return MissingPackage(package, extra)
    return EngineError(f"{package} is installed but cannot be imported: {one_line(error)}")


def without_frames(error: OnewordError) -> OnewordError:
    """Strips the tracebacks of an error and its causes: their frames keep alive what the failed call allocated."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def one_line(error: BaseException, limit: int | None = 300) -> str:
    """An error's message on one line, by default truncated to 300 characters; its type's name if it has no message."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def counted(count: int, noun: str) -> str:
    """For example `1 step` and `2 steps`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def one_of(names: Iterable[str]) -> str:
    """What a value may be, after "must be": "a", "a or b", "one of a, b, c"."""
    known = list(names)
    return f"one of {', '.join(known)}" if len(known) > 2 else " or ".join(known)
