"""API keys: which tenant a key belongs to, and what that tenant may use. Only hashes of keys are stored.

The file is TOML with one table per tenant:

    [alice]
    sha256 = "0000000000000000000000000000000000000000000000000000000000000000"   # placeholder
    max_words = 1000                     # optional
    max_bytes = 104857600                # optional, of all words
    max_result_bytes = 1073741824        # optional, of pictures that wait for an hour to be fetched, and kept answers
    pixel_steps_per_minute = 100000000   # optional, unlimited by default

A key is random and long, so a plain hash of it is safe: there is nothing to guess. Not covered: passwords.
"""

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneword.engines.errors import FileError, UsageError, one_line

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HASH = re.compile(r"[0-9a-fA-F]{64}")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_LIMITS = ("max_words", "max_bytes", "max_result_bytes", "pixel_steps_per_minute")
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Tenant:
    """Someone who uses the server: an owner of words, with quotas."""

    name: str
    max_words: int = 1000
    max_bytes: int = 100 << 20
    """Of all words together."""
    max_result_bytes: int = 1 << 30
    """Of the pictures in the store whose addresses were answers, and the answers kept there."""
    pixel_steps_per_minute: int | None = None
    """None means no limit."""


LOCAL = Tenant("local")
"""The only tenant of a server without keys."""


class Keys:
    """The tenants of a key file. A reload replaces all of them at once, or none if the file is broken."""

    def __init__(self, path: Path, tenants: Mapping[bytes, Tenant]) -> None:
        """`tenants` by the sha256 of their keys."""
        self.path = path
        self._tenants = tenants

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """Raises UsageError if there is no such file, FileError if it is broken."""
        return cls(path, _read_tenants(path))

    def __len__(self) -> int:
        return len(self._tenants)

    def reload(self) -> None:
        """Reads the file again. Raises as `read`, and then keeps the keys that it has."""
        self._tenants = _read_tenants(self.path)

    def named(self, name: str) -> Tenant:
        """The tenant of this name; one whose key is gone has the usual quotas."""
        return next((tenant for tenant in self._tenants.values() if tenant.name == name), Tenant(name))

    def tenant(self, key: str) -> Tenant | None:
        """The tenant of a key. The time it takes does not depend on which entry matches, or on how much of it does."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for entry, tenant in self._tenants.items():
            if hmac.compare_digest(entry, digest):
                found = tenant
        return found


def new_key(name: str) -> tuple[str, str]:
    """A new random key for a tenant, and the lines for the key file, which do not hold the key. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"the name {name!r} is not allowed: {_NAMES}")
    key = f"ow_{secrets.token_urlsafe(32)}"
    table = name if _BARE.fullmatch(name) else f'"{name}"'
    return key, f'[{table}]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'


_NAMES = "1 to 64 letters, digits and . _ @ -, the first a letter or digit"


def _read_tenants(path: Path) -> dict[bytes, Tenant]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise FileError(f"{path} has more than {_MAX_BYTES >> 20} MiB: is it a file of keys?")
        tables = tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no key file {path}: ti-serve --new-key NAME prints an entry for one") from None
    except OSError as error:
        raise FileError(f"cannot read the key file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise FileError(f"{path} is not a text file in UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FileError(f"{path} is not valid TOML: {one_line(error)}") from None
    if not tables:
        raise FileError(f"{path} has no keys: ti-serve --new-key NAME prints an entry")
    tenants: dict[bytes, Tenant] = {}
    for name, table in tables.items():
        digest, tenant = _entry(path, name, table)
        if digest in tenants:
            raise FileError(f"{path}: [{tenants[digest].name}] and [{name}] have the same key, each needs its own")
        tenants[digest] = tenant
    return tenants


def _entry(path: Path, name: str, table: Any) -> tuple[bytes, Tenant]:
    """One table of the file, checked: the key's hash, and the tenant."""
    if not _NAME.fullmatch(name):
        raise FileError(f"{path}: the name {name[:80]!r} is not allowed: {_NAMES}")
    if not isinstance(table, dict):
        raise FileError(f"{path}: {name} is outside of a table: start one with [NAME]")
    if unknown := sorted(table.keys() - {"sha256", *_LIMITS}):
        raise FileError(
            f"{path}: [{name}] has the unknown field {unknown[0]!r}, but may have only sha256, {', '.join(_LIMITS)}"
        )
    digest = table.get("sha256")
    if not isinstance(digest, str) or not _HASH.fullmatch(digest):
        raise FileError(
            f"{path}: sha256 of [{name}] is not 64 hexadecimal digits: ti-serve --new-key NAME prints an entry"
        )
    limits = {field: table[field] for field in _LIMITS if field in table}
    for field, value in limits.items():
        if type(value) is not int or value < 0:
            raise FileError(f"{path}: {field} of [{name}] is {value!r}, but must be a whole number, 0 or more")
    return bytes.fromhex(digest), Tenant(name, **limits)
