"""API keys: where they come from, and whose key a request carries.

In: flags, a file and the environment; later the headers of requests. Out: who it is, or nobody. Keys are kept as digests. Every
one of them is compared, each in constant time, so that how long it takes says nothing about any key.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwenkit.serve.caller import Caller
from qwenkit.serve.config import ServeConfig

KEYS_VARIABLE = "QWENKIT_API_KEYS"
ADMIN_VARIABLE = "QWENKIT_ADMIN_KEY"
MAX_FILE = 1 << 20  # bytes of a file of keys
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class _Key:
    digest: bytes
    owner: Caller


class Keys:
    """The keys of a server. Raises ValueError, never showing a key, for one that cannot be used."""

    def __init__(self, named: Iterable[tuple[str, str]] = (), admin: str | None = None) -> None:
        self._keys: list[_Key] = []
        seen: set[bytes] = set()
        for name, key in named:
            digest = _digest(_checked(name, key))
            if digest in seen:
                continue
            seen.add(digest)
            self._keys.append(_Key(digest, Caller(name, digest[:12].hex(), is_limited=True)))
        self.are_set = bool(self._keys)
        self.admin_is_set = admin is not None
        if admin is not None:
            digest = _digest(_checked("admin_key", admin))
            if digest in seen:
                raise ValueError("admin_key is also an API key, it must be another one")
            self._keys.append(_Key(digest, Caller("admin", "", is_admin=True)))

    @classmethod
    def of(cls, config: ServeConfig, environ: Mapping[str, str]) -> Keys:
        """Keys of --api-key, --api-key-file and QWENKIT_API_KEYS (separated by commas or white space), all together.

        Raises ValueError or OSError for files that cannot be used.
        """
        named = [(f"key-{number}", key) for number, key in enumerate(config.api_key, start=1)]
        if config.api_key_file is not None:
            named += _read_file(Path(config.api_key_file))
        from_environment = re.split(r"[,\s]+", environ.get(KEYS_VARIABLE, "").strip(", \n\t"))
        named += [(f"env-{number}", key) for number, key in enumerate(filter(None, from_environment), start=1)]
        admin = config.admin_key
        if config.admin_key_file is not None:
            words = _read_text(Path(config.admin_key_file), "admin_key_file").split()
            if len(words) != 1:
                raise ValueError(
                    f"admin_key_file: {config.admin_key_file} holds {len(words)} words, allowed is one key"
                )
            admin = words[0]
        return cls(named, admin or environ.get(ADMIN_VARIABLE) or None)

    def has(self, namespace: str) -> bool:
        """Whether somebody may still come in the name of `namespace`, which is a key's; "" is the admin's, and everybody's where
        no key is needed."""
        if namespace == "":
            return self.admin_is_set or not self.are_set
        return any(key.owner.namespace == namespace for key in self._keys)

    def owner(self, candidates: Iterable[bytes]) -> Caller | None:
        """Whose key one of `candidates` is, as they came in the headers."""
        found: Caller | None = None
        for candidate in candidates:
            digest = hashlib.sha256(candidate).digest()
            for key in self._keys:
                if hmac.compare_digest(digest, key.digest):
                    found = key.owner
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _checked(name: str, key: str) -> str:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"the API key {name} is empty or has characters other than printable ASCII without blanks")
    return key


def _read_file(path: Path) -> list[tuple[str, str]]:
    """Keys of a file: a line is KEY or NAME KEY; blank lines and lines that begin with # say nothing."""
    named: list[tuple[str, str]] = []
    for number, line in enumerate(_read_text(path, "api_key_file").splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) > 2 or (len(words) == 2 and not _NAME.fullmatch(words[0])):
            raise ValueError(f"api_key_file: line {number} of {path} is neither KEY nor NAME KEY")
        named.append((words[0] if len(words) == 2 else f"file-{number}", words[-1]))
    if not named:
        raise ValueError(f"api_key_file: {path} holds no key")
    return named


def _read_text(path: Path, field: str) -> str:
    """The text of a regular file of keys. Never waits: neither opening nor reading a FIFO that took its place does."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{field} is {str(path)!r}, which is not a file")
        if status.st_size > MAX_FILE:
            raise ValueError(f"{field}: {path} has {status.st_size} bytes, allowed are {MAX_FILE}")
        data = file.read(MAX_FILE)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{field}: {path} is not UTF-8 text") from None
