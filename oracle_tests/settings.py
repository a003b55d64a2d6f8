"""The user's choices: `[tool.loracle]` of pyproject.toml, or loracle.toml, in the current folder."""

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .contract import UsageError, nearest


@dataclass
class Settings:
    """What a user's project says of its implementations.

    implementations: slug -> "package.module", "file.py", either with ":object".
    arrays, dtype, device, generator, tolerance: override the implementation's own `LORACLE` record.
    profile: "quick", "default" or "deep".
    expected_failures: law id -> reason.
    """

    implementations: dict[str, str] = field(default_factory=dict)
    arrays: str | None = None
    dtype: str | None = None
    device: str | None = None
    generator: str | None = None
    tolerance: float | None = None
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
                table = tomllib.loads(path.read_text())
            except tomllib.TOMLDecodeError as error:
                raise UsageError(f"{path} is not valid TOML: {error}") from error
            for key in keys:
                table = table.get(key, {})
            if table or not keys:
                return _checked(path, table)
    return Settings()


def _checked(path: Path, table: dict[str, Any]) -> Settings:
    kinds = {"implementations": dict, "expected_failures": dict, "tolerance": (int, float)}
    known = [f.name for f in fields(Settings)]
    for key, value in table.items():
        if key not in known:
            raise UsageError(f"{path} has an unknown key {key!r}{nearest(key, known)}; known: {', '.join(known)}")
        if not isinstance(value, kinds.get(key, str)):  # type: ignore[arg-type]
            raise UsageError(
                f"{path}: {key} is {value!r}; needed a {'table' if kinds.get(key) is dict else 'number' if key in kinds else 'string'}"
            )
    return Settings(**table)
