"""Six stub runs on a Ray cluster of two nodes; of one of them the power goes.

python ray_process.py OUT [lose]; see test_ray_engine.py.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = "only for this test, 0123456789abcdef"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"

import psutil
from ray.cluster_utils import Cluster as TestCluster
from stub_runs import STUB, stub_runs

from nibble.experiment import ranking, record, sweep
from nibble.experiment.ray_engine import connected

GB = 10**9
NODE = {"num_cpus": 2, "memory": 4 * GB, "include_dashboard": False}


def lose(nodes, second, out):
    """End a node with all its processes as soon as two runs have trained on it."""
    while True:
        there = [p for p in children(out) if p.environ().get("NIBBLE_PLACE", "")[-6:] == second]
        if len(there) == 2 and all(trained(p) for p in there):
            break
        time.sleep(0.05)
    nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
    for process in there:
        process.send_signal(signal.SIGKILL)
    print("lost", *sorted(Path(p.cmdline()[-1]).stem for p in there if p.is_running()), flush=True)


def children(out):
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline()[-1:] and process.cmdline()[-1].startswith(f"{out}/"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def trained(process):
    saved = Path(process.cmdline()[-1]).with_suffix("") / "checkpoints" / "saved"
    return saved.is_file() and int(saved.read_text() or 0) >= 3


def main(out, is_losing):
    planned = stub_runs([0.01, 0.02, 0.03, 0.04, 0.05, 0.06], [GB] * 6, steps=30)
    nodes = TestCluster(initialize_head=True, head_node_args=NODE)
    second = nodes.add_node(**NODE)
    os.environ["RAY_ADDRESS"] = nodes.address
    with record.hold(out), connected(2) as (cluster, _):
        assert len(cluster.nodes()) == 2
        cluster.train = STUB
        record.write_record(out, planned, has_halving=False)
        if is_losing:
            given = (nodes, second.node_id[:6], out)
            threading.Thread(target=lose, args=given, daemon=True).start()
        rows = sweep.run_sweep(out, planned, cluster)
        ranking.write_ranking(out, ranking.rank(rows))
        print("nodes", len(cluster.nodes()), flush=True)
    nodes.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["lose"])
