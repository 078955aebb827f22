"""Whether processes, addresses and workers of a stack are alive."""

import urllib.error
import urllib.request

from restitch.registry.stack import StackProcess
from restitch.registry.store.attempts import process_began


def is_running(process: StackProcess) -> bool:
    """Whether a process of the stack is there, and is the very one."""
    return process_began(process.pid) == process.began


def answers(url: str) -> bool:
    """Whether an address answers with success."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def workers_online(pool: str) -> list[str]:
    """The names of the workers of a pool that have shown signs of life lately."""
    from prefect.exceptions import ObjectNotFound

    from restitch.deployments.server.deploy import client

    with client() as prefect:
        try:
            found = prefect.read_workers_for_work_pool(pool)
        except ObjectNotFound:
            return []
    return [worker.name for worker in found if str(worker.status).endswith("ONLINE")]
