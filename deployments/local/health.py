"""Signs of life of a stack's processes and addresses."""

import urllib.error
import urllib.request

from restitch.registry.stack import StackProcess
from restitch.registry.store.attempts import process_began


def is_running(process: StackProcess) -> bool:
    """Whether a process of the stack runs, and its id was not given to another process."""
    return process_began(process.pid) == process.began


def answers(url: str) -> bool:
    """Whether an address answers with status 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
