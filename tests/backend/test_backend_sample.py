"""A fixed sample of the onnx package's backend tests, served over HTTP; `run.py` serves all of them.

Nearly all the time goes into starting a worker process for each model, about 0.2 s of CPU time. More
models to a server would save little more, and take more memory at a time.
"""

from __future__ import annotations

import pytest

from tests.backend import run
from tests.backend.cases import Case, cases, sample
from tests.backend.direct import Sort

MODELS_PER_SERVER = 50

TIME_LIMIT_S = 300
"""For one server on a machine that has other things to do; alone it takes a few seconds."""


@pytest.fixture(scope="module")
def chosen() -> list[Case]:
    return sample(cases(), run.SAMPLE)


@pytest.mark.slow
@pytest.mark.timeout(TIME_LIMIT_S)
@pytest.mark.parametrize("start", range(0, run.SAMPLE, MODELS_PER_SERVER))
def test_backend_cases_come_back_as_from_onnx_runtime(chosen, start):
    results = run.check(chosen[start : start + MODELS_PER_SERVER])
    assert len(results) == MODELS_PER_SERVER
    failed = run.failures(results)
    assert not failed, "\n".join(failed)
    sorts = {result.verdict.sort for result in results}
    assert {Sort.SERVED, Sort.REFUSED} <= sorts
