"""The user's choices: `[tool.loracle]` of pyproject.toml, or loracle.toml, in the current folder."""

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .contract import UsageError, check_paper, nearest

PROFILES = {"quick": 10, "default": 50, "deep": 1000}
_NUMBER, _TABLE = ((int, float), "number"), (dict, 'table, name = "text"')
_KINDS: dict[str, tuple[Any, str]] = {"implementations": _TABLE, "expected_failures": _TABLE, "tolerance": _NUMBER, "time_limit": _NUMBER}


@dataclass
class Settings:
    """What a user's project says of its implementations.

    implementations: slug -> "package.module", "file.py", either with ":object".
    arrays, dtype, device, generator, tolerance: override the implementation's own `LORACLE` record.
    time_limit: seconds a law may take.
    profile: "quick", "default" or "deep".
    expected_failures: law id -> reason.
    """

    implementations: dict[str, str] = field(default_factory=dict)
    arrays: str | None = None
    dtype: str | None = None
    device: str | None = None
    generator: str | None = None
    tolerance: float | None = None
    time_limit: float = 30.0
    profile: str = "default"
    expected_failures: dict[str, str] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """The options that go to `load`, those that are set."""
        names = ("arrays", "dtype", "device", "generator", "tolerance")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def load_settings(folder: Path) -> Settings:
    """Read the settings of `folder`; loracle.toml wins over pyproject.toml.

    Raises:
        UsageError: the file is no TOML, or has a key that is not known or of another type.
    """
    for name, keys in (("loracle.toml", ()), ("pyproject.toml", ("tool", "loracle"))):
        path = folder / name
        if path.exists():
            try:
                table = tomllib.loads(path.read_text("utf-8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise UsageError(f"{path} is not valid TOML: {error}") from error
            for key in keys:
                table = table.get(key, {}) if isinstance(table, dict) else table
            if table or not keys:
                return _checked(path, table)
    return Settings()


def _checked(path: Path, table: Any) -> Settings:
    known = [f.name for f in fields(Settings)]
    if not isinstance(table, dict):
        raise UsageError(f"{path}: loracle is {table!r}; needed a table with some of: {', '.join(known)}")
    for key, value in table.items():
        if key not in known:
            raise UsageError(f"{path} has an unknown key {key!r}{nearest(key, known)}; known: {', '.join(known)}")
        kind, needed = _KINDS.get(key, (str, "string"))
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(f"{path}: {key} is {value!r}; needed a {needed}")
        for inner, text in value.items() if isinstance(value, dict) else ():
            if not isinstance(text, str):
                raise UsageError(f"{path}: {key}.{inner} is {text!r}; needed a string")
    settings = Settings(**table)
    if settings.profile not in PROFILES:
        raise UsageError(
            f"{path}: there is no profile {settings.profile!r}{nearest(settings.profile, PROFILES)}; known: {', '.join(PROFILES)}"
        )
    for slug in settings.implementations:
        check_paper(slug)
    for id in settings.expected_failures:
        check_paper(id.partition(".")[0])
    return settings
