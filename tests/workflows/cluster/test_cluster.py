"""A Ray cluster that was there before: named by RAY_ADDRESS, joined, and left running."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile

import pytest
from clusters import end
from small import ROOT, SMALL

pytestmark = pytest.mark.ray


@pytest.fixture
def head(tmp_path):
    """(address, environment, process) of a head node of its own, with two CPUs and token authentication, on the loopback."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 2)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_TRACKING"))}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # Ray's sockets need a short path
        words = "start --head --block --node-ip-address 127.0.0.1 --port 0 --num-cpus 2 --include-dashboard false"
        process = subprocess.Popen(
            [f"{os.path.dirname(sys.executable)}/ray", *words.split(), "--temp-dir", f"{folder}/ray"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        shown = ""
        assert process.stdout is not None
        for line in process.stdout:
            shown += line
            if found := re.search(r"--address='([\d.]+:\d+)'", shown):
                break
        else:
            raise AssertionError(shown)
        yield found[1], environment | {"RAY_TMPDIR": folder}, process
        end(process, signal.SIGKILL)


@pytest.mark.slow
def test_a_run_joins_the_cluster_of_ray_address_and_leaves_it(head, tmp_path):
    address, environment, _ = head

    def run(**more):
        words = [
            sys.executable,
            "-m",
            "workflows",
            "run",
            "--json",
            "--workspace",
            str(tmp_path / "w"),
            "--until",
            "teacher",
        ]
        for text in SMALL:
            words += ["--set", text]
        return subprocess.run(words, cwd=ROOT, env=environment | more, capture_output=True, text=True, timeout=400)

    done = run(RAY_ADDRESS=address)
    assert done.returncode == 0, done.stderr
    assert [s["name"] for s in json.loads(done.stdout)["stages"]] == ["prepare", "teacher"]
    script = "import ray; ray.init(logging_level='ERROR'); print(ray.cluster_resources()['CPU'])"
    still = subprocess.run(
        [sys.executable, "-c", script], env=environment | {"RAY_ADDRESS": address}, capture_output=True, text=True
    )
    assert still.stdout.split() == ["2.0"], still.stderr


JOINS = """
import ray
from workflows.cluster.session import own_ray, ray_session

with ray_session():
    print(own_ray(), ray.cluster_resources()["CPU"])
print(own_ray())
"""


def test_a_ray_that_another_process_started_for_itself_is_not_ones_own(ray_cluster):
    """Workers that hold nothing would be beside those of the other."""
    import ray

    from workflows.cluster.session import own_ray

    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", JOINS], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "2.0", "False"], done.stderr
    assert own_ray()


@pytest.mark.slow
def test_a_ray_of_this_machine_is_joined_and_one_that_was_killed_is_not_waited_for(head, tmp_path):
    address, environment, process = head

    def doctor():
        words = [sys.executable, "-m", "workflows", "doctor", "--workspace", str(tmp_path / "w")]
        env = environment | {"COLUMNS": "300"}
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        (line,) = [line for line in done.stdout.splitlines() if "CPUs, " in line]
        assert "Traceback" not in done.stderr
        return line

    assert f"joins the one that was started on this machine, at {address}" in doctor()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    line = doctor()
    assert f"does not answer at {address} (Connection refused): this run starts its own" in line
    assert line.startswith("OK")


def test_a_cluster_that_is_not_there_is_one_line(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_ADDRESS": "127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "workflows", "run", "--workspace", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "no cluster answers at 127.0.0.1:9 (Connection refused)" in done.stderr


TASKS = """
import os, ray, time
from workflows.cluster.session import device_of_task, task_options

ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, logging_level=40)

@ray.remote(**task_options(use_gpu=True))
def where(wait):
    time.sleep(wait)
    return device_of_task("cuda"), os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")

both = ray.get([where.remote(3), where.remote(3)])
after = ray.get([where.remote(0) for _ in range(6)])
print(sorted(device for device, _, _ in both), len({pid for _, pid, _ in both + after}), {seen for _, _, seen in both + after})
"""


@pytest.mark.parametrize("visible", [None, pytest.param("4,7", marks=pytest.mark.slow)])
def test_a_task_knows_its_gpu_though_its_process_had_another(visible):
    """Two GPUs that are not there, which Ray gives all the same."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CUDA_VISIBLE"))}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
    done = subprocess.run([sys.executable, "-c", TASKS], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().splitlines()[-1:] == [f"['cuda:0', 'cuda:1'] 2 {{{visible!r}}}"], done.stderr
