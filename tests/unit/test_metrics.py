"""The series of a version: made on first use, gone once it is unloaded."""

from gateway.telemetry.metrics import Metrics


def labels(metrics: Metrics) -> set[tuple[str, str]]:
    return {
        (sample.labels["model"], sample.labels["version"])
        for family in metrics.registry.collect()
        for sample in family.samples
    }


def use_all(version) -> None:
    version.batch(2, 1000)
    version.answered(2, 1000, 100, 500)
    version.failed(503, 1000)
    version.queue_depth(3)
    version.worker(0, up=True)
    version.worker(1, up=True, restarted=True)


def test_a_removed_version_has_no_series_and_makes_none():
    metrics = Metrics()
    gone, stays = metrics.version("m", 1), metrics.version("m", 2)
    use_all(gone)
    use_all(stays)
    before = labels(metrics)
    gone.remove()
    gone.remove()
    use_all(gone)
    assert before == {("m", "1"), ("m", "2")}
    assert labels(metrics) == {("m", "2")}
    assert gone.statistics.success.count == 2


def test_a_version_that_comes_back_begins_at_zero():
    metrics = Metrics()
    version = metrics.version("m", 1)
    use_all(version)
    version.remove()
    again = metrics.version("m", 1)
    again.failed(404, 1)
    version.remove()  # of the one before: nothing
    text = metrics.render().decode()
    assert 'gateway_requests_total{code="404",model="m",version="1"} 1.0' in text
    assert 'code="200"' not in text
