"""A worker of Dask, started by hand, that stands while its code is edited."""

import importlib
import os
import subprocess
import sys

import pytest

from lib.evidence import EvidenceError, provenance
from lib.evidence.code import code_digest
from lib.paths import ROOT

pytestmark = pytest.mark.slow


def test_a_standing_worker_of_dask_is_refused_once_its_code_was_edited(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    (tmp_path / "toy_standing.py").write_text("def run(settings, *, seed):\n    return {'y': 1}\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = importlib.import_module("toy_standing").run
    cluster = distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None, protocol="tcp")
    with cluster, distributed.Client(cluster) as client:
        worker = subprocess.Popen(
            [sys.executable, "-m", "dask", "worker", cluster.scheduler_address, "--nthreads", "1",
             "--no-nanny", "--no-dashboard", "--local-directory", tmp_path / "dask"],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:

            def ask():
                asked = client.submit(provenance.of_worker, run, code_digest(run), "cpu", pure=False)
                return asked.result(timeout=30)

            assert ask()["machine"]
            (tmp_path / "toy_standing.py").write_text("def run(settings, *, seed):\n    return {'y': 2}\n")
            with pytest.raises(EvidenceError, match=rf"process \(number {worker.pid}\).* restart .*workers"):
                ask()
        finally:
            worker.kill()
            worker.wait()
