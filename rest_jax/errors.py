"""Errors a user can act on. Each kind has one exit code, so a launcher can decide whether to retry.

Floor 0. A message names the thing that is wrong, where it is, and the remedy; `main` prints it on one line.
"""

from __future__ import annotations


class RestError(Exception):
    """A failure with a cause and a remedy that fit on one line.

    Args:
      what: what is wrong, naming the thing ("threshold list falls: 0.9 > 0.7").
      where: the file, key or phase it was found in; may be empty.
      remedy: what the user should do about it.
    """

    exit_code = 70

    def __init__(self, what: str, *, where: str = "", remedy: str = ""):
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what]
        if self.where:
            parts.append(f"[{self.where}]")
        line = " ".join(parts)
        if self.remedy:
            line = f"{line.rstrip('.')}. {self.remedy}"
        return " ".join(line.split())


class DataError(RestError):
    """The data is there and is wrong: empty file, bad row, nothing survives a filter."""

    exit_code = 65


class MissingInputError(RestError):
    """A file, corpus, package or checkpoint that the work needs is not there."""

    exit_code = 66


class OutputError(RestError):
    """The output cannot be written: disk full, read-only, vanished."""

    exit_code = 74


class LockedError(RestError):
    """Another live run owns the directory."""

    exit_code = 75


class NonFiniteError(RestError):
    """A loss, gradient or reward is NaN or infinite more often than is allowed."""

    exit_code = 76


class IntegrityError(RestError):
    """A sealed file does not have the digest that its seal states, and cannot be made again here."""

    exit_code = 77


class ConfigError(RestError):
    """The configuration is wrong, or not the one that an existing output was made with."""

    exit_code = 78


def require(condition: bool, what: str, where: str, remedy: str) -> None:
    """Refuses a setting.

    Raises:
      ConfigError: the condition does not hold.
    """
    if not condition:
        raise ConfigError(what, where=where, remedy=remedy)
