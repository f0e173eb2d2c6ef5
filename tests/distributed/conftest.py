"""Jobs of one, two and four processes, started when first used and kept for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.harness import Job


@pytest.fixture(scope="session")
def jobs() -> Iterator[dict[int, Job]]:
    jobs = {size: Job(size) for size in (1, 2, 4)}
    yield jobs
    for job in jobs.values():
        job.stop()


@pytest.fixture(scope="session")
def job(jobs: dict[int, Job]) -> Job:
    return jobs[2]
