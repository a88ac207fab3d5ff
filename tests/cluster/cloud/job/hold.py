"""A job: holds a machine of the CPU group and one of the GPU group until the second has been replaced. A line of JSON a step."""

import json
import time

import ray

from workflows.cluster.session import room


@ray.remote(max_restarts=-1, max_task_retries=-1)
class Place:
    def address(self):
        return ray.util.get_node_ip_address()


def tell(**what):
    print(json.dumps(what), flush=True)


ray.init(logging_level="ERROR")
tell(step="begun", most=room())
cpu, gpu = Place.options(num_cpus=16).remote(), Place.options(num_cpus=1, num_gpus=1).remote()
first = ray.get(gpu.address.remote())
tell(step="placed", cpu=ray.get(cpu.address.remote()), gpu=first)
while (now := ray.get(gpu.address.remote())) == first:
    time.sleep(0.5)
tell(step="replaced", gpu=now)
