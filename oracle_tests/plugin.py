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
# Properties of a test, in its report and in JUnit XML
LAW, OUTCOME, RUN, NOTE, DERIVED = "loracle.law", "loracle.outcome", "loracle.run", "loracle.note", "loracle.derived"
OUTCOMES = ("holds", "fails", "missing", "expected to fail", "skipped")
_config: pytest.Config | None = None
_settings: Settings | None = None
_item: pytest.Item | None = None


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
    global _config, _settings
    _config, _settings = config, None
    for item in config.getoption("--implementation"):
        if "=" not in item:
            pytest.exit(f"--implementation {item}: needed PAPER=MODULE, for example lora=my_package.my_module", returncode=3)
    # Whoever names an implementation runs laws: say at once what cannot be loaded, and not in each worker of pytest-xdist
    if config.getoption("--implementation") and not hasattr(config, "workerinput"):
        for paper, spec in _load_settings(config).implementations.items():
            _load(paper, spec, config)


def _load_settings(config: pytest.Config) -> Settings:
    """The user's choices, command line over file; read once, when the first law is collected."""
    global _settings
    if _settings is None:
        from .contract import UsageError, check_paper
        from .settings import load_settings

        try:
            chosen = load_settings(Path.cwd())
            named = dict(item.split("=", 1) for item in config.getoption("--implementation"))
            for paper in named:
                check_paper(paper)
        except UsageError as error:
            pytest.exit(str(error), returncode=3)
        chosen.implementations = named or chosen.implementations
        chosen.profile = config.getoption("--law-profile") or chosen.profile
        chosen.dtype = config.getoption("--law-dtype") or chosen.dtype
        chosen.device = config.getoption("--law-device") or chosen.device
        _settings = chosen
    return _settings


def _load(paper: str, spec: str, config: pytest.Config) -> Implementation:
    from .contract import UsageError
    from .loading import load
    from .running import check_laws

    chosen = _load_settings(config)
    try:
        check_laws(paper, [id for id in chosen.expected_failures if id.partition(".")[0] == paper])
        return load(spec, paper=paper, **chosen.options())
    except UsageError as error:
        pytest.exit(str(error), returncode=3)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of the laws collect just the papers that have an implementation, if any has been named."""
    if collection_path.parent != HERE or not collection_path.name.startswith("test_"):
        return None
    named = _load_settings(config).implementations
    return True if named and collection_path.stem.removeprefix("test_") not in named else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Theorem checks test the mathematics, no implementation: where one is named they would only inflate the count."""
    theorems = [item for item in items if (law := getattr(getattr(item, "function", None), "law", None)) is not None and law.is_theorem]
    if theorems and _load_settings(config).implementations:
        config.hook.pytest_deselected(items=theorems)
        items[:] = [item for item in items if item not in theorems]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    law = getattr(metafunc.function, "law", None)
    if law is not None and "impl" in metafunc.fixturenames:
        spec = _load_settings(metafunc.config).implementations.get(law.paper, f"loracle.reference.{law.paper}")
        metafunc.parametrize("impl", [(law.paper, spec)], ids=[f"{law.id}-{spec}"], indirect=True, scope="session")


@pytest.fixture(scope="session")
def impl(request: pytest.FixtureRequest) -> Implementation:
    """The implementation under test: the one named for the law's paper, else the reference file."""
    paper, spec = request.param
    return _load(paper, spec, request.config)


def pytest_runtest_setup(item: pytest.Item) -> None:
    global _item
    _item = item


def run_law(law: Law, impl: Implementation | None) -> None:
    """Evaluate a law and end the test accordingly."""
    __tracebackhide__ = True
    from .running import check_laws, describe, evaluate, expect_failure

    assert _config is not None
    assert _item is not None
    chosen = _load_settings(_config)
    check_laws(law.paper, [id for id in chosen.expected_failures if id.partition(".")[0] == law.paper])
    result = expect_failure(evaluate(law, impl, profile=chosen.profile, time_limit=chosen.time_limit), chosen.expected_failures)
    if impl is not None:
        options = describe(impl)
        run = (
            f"{law.paper} of {impl.name} (arrays {options['arrays']}, dtype {options['dtype']}, tolerance factor {options['tolerance']:g})"
        )
        _item.user_properties += [(LAW, law.id), (OUTCOME, result.outcome), (RUN, run), (NOTE, result.message)]
        if result.derived:
            _item.user_properties.append((DERIVED, ", ".join(result.derived)))
    if result.outcome == "fails":
        pytest.fail(result.explanation or result.message, pytrace=False)
    if result.outcome in ("missing", "skipped"):
        pytest.skip(f"{result.outcome}: {result.message}")
    if result.outcome == "expected to fail":
        pytest.xfail(result.message)


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """Count a missing function by a word of its own: it is neither passed nor a plain skip."""
    if report.skipped and _properties(report).get(OUTCOME) == "missing":
        return "missing", "-", "MISSING"
    return None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """All five outcomes, counted for each implementation, with the tolerance factor."""
    laws = [_properties(report) for report in _reports(terminalreporter)]
    for run, counts in _counts(terminalreporter).items():
        terminalreporter.section(run)
        for law in laws:
            if law[RUN] == run and law[OUTCOME] in ("missing", "skipped", "expected to fail"):
                terminalreporter.line(f"{law[LAW]} {law[OUTCOME]}: {law[NOTE]}")
        if derived := sorted({law[DERIVED] for law in laws if law[RUN] == run and DERIVED in law}):
            terminalreporter.line(f"derived, as the implementation lacks it: {', '.join(derived)}")
        terminalreporter.line(", ".join(f"{counts.get(outcome, 0)} {outcome}" for outcome in OUTCOMES))
    if _checked_nothing(terminalreporter):
        terminalreporter.line("Nothing was checked: the implementation lacks what these laws need, or its precision is too low.")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run of laws that checked nothing says so by exit code 2."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and reporter is not None and _checked_nothing(reporter):
        session.exitstatus = 2


def _properties(report: Any) -> dict[str, str]:
    return dict(getattr(report, "user_properties", ()))


def _reports(reporter: Any) -> list[Any]:
    """The reports of laws; those of set-up and teardown carry the same properties and are left out."""
    return [r for reports in reporter.stats.values() for r in reports if getattr(r, "when", "") == "call" and LAW in _properties(r)]


def _counts(reporter: Any) -> dict[str, dict[str, int]]:
    """How often each outcome came, for each implementation."""
    counts: dict[str, dict[str, int]] = {}
    for properties in map(_properties, _reports(reporter)):
        of_run = counts.setdefault(properties[RUN], {})
        of_run[properties[OUTCOME]] = of_run.get(properties[OUTCOME], 0) + 1
    return counts


def _checked_nothing(reporter: Any) -> bool:
    outcomes = {outcome for counts in _counts(reporter).values() for outcome in counts}
    return bool(outcomes) and outcomes <= {"missing", "skipped"}
