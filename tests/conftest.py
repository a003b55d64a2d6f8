"""What several test files share."""

import functools

import pytest

from loracle.toy_tasks import experiment


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """The results of an experiment's quick run, by slug; each is run once."""

    @functools.cache
    def run(slug: str) -> experiment.Results:
        task, config = experiment.load(slug, quick=True)
        return experiment.run(task, config, seeds=range(3), out=tmp_path_factory.mktemp(slug), quick=True)

    return run
