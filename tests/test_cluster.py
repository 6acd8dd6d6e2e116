"""Workers: what each has of its own, and clusters that cannot do the work."""

import os
from importlib.util import find_spec

import pytest

from ntkbook.publish import cluster

needs_dask = pytest.mark.skipif(find_spec("distributed") is None, reason="the dask extra is not installed")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for key in (*cluster.THREADS, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(key, raising=False)


def facts(shares):
    """Threads and GPU of each worker."""
    return [(share["OMP_NUM_THREADS"], share.get("CUDA_VISIBLE_DEVICES")) for share in shares]


def test_a_worker_has_two_cores_or_its_share_of_them():
    assert facts(cluster.environments(100, 8, [])) == [("2", None)] * 4
    assert facts(cluster.environments(100, 8, [], workers=3)) == [("2", None)] * 3
    assert facts(cluster.environments(100, 1, [])) == [("1", None)]
    assert facts(cluster.environments(100, 2, [], workers=4)) == [("1", None)] * 4
    assert set(cluster.environments(1, 8, [])[0].items()) == {(key, "8") for key in cluster.THREADS}


def test_there_are_no_more_workers_than_jobs():
    assert facts(cluster.environments(2, 16, [])) == [("8", None)] * 2
    assert facts(cluster.environments(1, 16, ["0", "1"])) == [("16", "0")]


def test_a_worker_has_one_gpu():
    assert facts(cluster.environments(100, 32, ["0", "1", "2", "3"])) == [("8", str(i)) for i in range(4)]
    shared = cluster.environments(100, 32, ["5", "GPU-ab"], workers=4)
    assert facts(shared) == [("8", "5"), ("8", "GPU-ab"), ("8", "5"), ("8", "GPU-ab")]
    assert facts(cluster.environments(100, 32, ["0", "1"], workers=1)) == [("32", "0")]


def test_threads_that_the_user_has_set_are_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (share,) = cluster.environments(1, 8, [])
    assert (share["OMP_NUM_THREADS"], share["MKL_NUM_THREADS"]) == ("3", "8")


def test_gpus_are_those_that_the_user_left_visible(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert cluster.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-ab,99")  # torch counts up to the first that is not there
    assert cluster.visible_gpus() == ["4", "GPU-ab"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert cluster.visible_gpus() == []


@needs_dask
def test_each_worker_of_this_machine_gets_its_environment(monkeypatch):
    monkeypatch.setattr(cluster, "visible_gpus", lambda: ["3", "GPU-ab"])
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with cluster.local(7, cuda=True) as client:
        assert set(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values()) == {"3", "GPU-ab"}
        assert set(client.run(os.getenv, "OMP_NUM_THREADS").values()) == {"5"}
        assert set(client.nthreads().values()) == {1}


@needs_dask
def test_a_scheduler_must_answer():
    with (
        pytest.raises(cluster.ClusterError, match=r"no Dask scheduler answers at 'tcp://127\.0\.0\.1:9'"),
        cluster.remote("tcp://127.0.0.1:9", timeout=1.0),
    ):
        pass


@needs_dask
def test_workers_must_have_one_thread_and_pass_the_check():
    from distributed import LocalCluster

    def check(path):
        raise ValueError(f"it does not see {path}")

    options = {
        "n_workers": 1,
        "processes": False,
        "protocol": "tcp",
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
    }
    with (
        LocalCluster(threads_per_worker=2, **options) as wide,
        pytest.raises(cluster.ClusterError, match="expected workers with one thread"),
        cluster.remote(wide.scheduler_address),
    ):
        pass
    with LocalCluster(threads_per_worker=1, **options) as fit, cluster.remote(fit.scheduler_address) as client:
        with pytest.raises(cluster.ClusterError, match=r"worker tcp://127\S+ cannot run the sweep: it does not see /x"):
            cluster.check_workers(client, check, "/x")
        cluster.check_workers(client, str, "/x")
