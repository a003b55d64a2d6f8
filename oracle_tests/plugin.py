"""The pytest plugin: `pytest --pyargs loracle.oracle_tests --implementation lora=my_package.my_module`.

It is loaded by every pytest run of an environment that has loracle, so it imports nothing heavy until a law runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .law import Law
    from .loading import Implementation
    from .settings import Settings

HERE = Path(__file__).parent
MISSING, TOO_COARSE = "missing: ", "skipped: "
_settings: Settings | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("loracle", "laws of low-rank adaptation")
    group.addoption(
        "--implementation",
        action="append",
        default=[],
        metavar="PAPER=MODULE",
        help="hold this module, file.py or module:object against the laws of PAPER (may be repeated); only these papers are collected",
    )
    group.addoption("--law-profile", choices=("quick", "default", "deep"), help="10, 50 or 1000 cases a law")
    group.addoption("--law-dtype", help="float64, float32, float16 or bfloat16")
    group.addoption("--law-device", help="cpu or cuda, for torch")


def pytest_configure(config: pytest.Config) -> None:
    global _settings
    _settings = None
    for item in config.getoption("--implementation"):
        if "=" not in item:
            raise pytest.UsageError(f"--implementation {item}: needed PAPER=MODULE, for example lora=my_package.my_module")


def _load_settings(config: pytest.Config) -> Settings:
    """The user's choices, command line over file; read once, when the first law is collected."""
    global _settings
    if _settings is None:
        from .contract import UsageError
        from .settings import load_settings

        try:
            _settings = load_settings(Path.cwd())
        except UsageError as error:
            raise pytest.UsageError(str(error)) from error
        _settings.implementations |= dict(item.split("=", 1) for item in config.getoption("--implementation"))
        _settings.profile = config.getoption("--law-profile") or _settings.profile
        _settings.dtype = config.getoption("--law-dtype") or _settings.dtype
        _settings.device = config.getoption("--law-device") or _settings.device
    return _settings


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of the laws collect just the papers that have an implementation, if any has been named."""
    if collection_path.parent != HERE or not collection_path.name.startswith("test_"):
        return None
    named = _load_settings(config).implementations
    return True if named and collection_path.stem.removeprefix("test_") not in named else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    law = getattr(metafunc.function, "law", None)
    if law is not None and "impl" in metafunc.fixturenames:
        spec = _load_settings(metafunc.config).implementations.get(law.paper, f"loracle.reference.{law.paper}")
        metafunc.parametrize("impl", [(law.paper, spec)], ids=[spec], indirect=True, scope="session")


@pytest.fixture(scope="session")
def impl(request: pytest.FixtureRequest) -> Implementation:
    """The implementation under test: the one named for the law's paper, else the reference file."""
    from .contract import UsageError
    from .loading import load

    paper, spec = request.param
    try:
        return load(spec, paper=paper, **_load_settings(request.config).options())
    except UsageError as error:
        pytest.exit(str(error), returncode=3)


def run_law(law: Law, impl: Implementation | None) -> None:
    """Evaluate a law and end the test accordingly."""
    __tracebackhide__ = True
    from .running import evaluate, expect_failure
    from .settings import Settings

    chosen = _settings or Settings()
    result = expect_failure(evaluate(law, impl, profile=chosen.profile), chosen.expected_failures)
    if result.outcome == "fails":
        pytest.fail(result.explanation or result.message, pytrace=False)
    if result.outcome == "missing":
        pytest.skip(MISSING + result.message)
    if result.outcome == "skipped":
        pytest.skip(TOO_COARSE + result.message)
    if result.outcome == "expected to fail":
        pytest.xfail(result.message)


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """Count a missing function by a word of its own: it is neither passed nor a plain skip."""
    if report.skipped and isinstance(report.longrepr, tuple) and MISSING in report.longrepr[2]:
        return "missing", "-", "MISSING"
    return None


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which every law was missing has checked nothing, and says so by exit code 2."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and reporter is not None:
        stats = {key: len(value) for key, value in reporter.stats.items() if key}
        if stats.get("missing") and not stats.get("passed") and not stats.get("xfailed"):
            session.exitstatus = 2
