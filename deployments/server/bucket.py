"""Make the bucket of `RESTITCH_STORE`, and check that its server supports conditional writes.

    python -m restitch.deployments.server.bucket

Only conditional writes keep two registrations at the same moment apart; a server that ignores
the conditions would silently lose one. The check creates an object next to the store twice and
swaps it twice; the server must refuse the second. The command may run again.
"""

import os
import sys
from typing import Any

from restitch.merging.errors import BadInput, RestitchError
from restitch.registry.home import STORE_VARIABLE
from restitch.registry.s3.client import client, code_of, parse_address, s3_errors, status_of
from restitch.registry.s3.conditional_writes import probe_conditional_writes, refusal
from restitch.registry.s3.retries import with_retries

_EXISTS = ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")


def prepare(address: str) -> str:
    """Make the bucket if it does not exist, and check conditional writes in it.

    Args:
        address: `s3://bucket/prefix`, as in `RESTITCH_STORE`.

    Returns:
        A sentence about the bucket.

    Raises:
        BadInput: it is not such an address.
        Unavailable: the server is away, refuses the account, or ignores conditions.
    """
    bucket, prefix = parse_address(address)
    with s3_errors(f"s3://{bucket}", "make the bucket"):
        made = _make(bucket)
    if not probe_conditional_writes(bucket, prefix):
        raise refusal(f"s3://{bucket}")
    state = "made" if made else "exists"
    return f"s3://{bucket}: {state}, its server supports conditional writes"


def _make(bucket: str) -> bool:
    from botocore.exceptions import ClientError

    try:
        with_retries(lambda: client().head_bucket(Bucket=bucket))
    except ClientError as error:
        if status_of(error) != 404:
            raise
    else:
        return False
    region = client().meta.region_name
    options: dict[str, Any] = {"CreateBucketConfiguration": {"LocationConstraint": region}}
    if region == "us-east-1":  # the default, which the server refuses as a constraint
        options = {}
    try:
        with_retries(lambda: client().create_bucket(Bucket=bucket, **options))
    except ClientError as error:
        if code_of(error) not in _EXISTS:  # another process made it at the same moment
            raise
        return False
    return True


def main() -> None:
    """Prepare the bucket of `RESTITCH_STORE`."""
    try:
        address = os.environ.get(STORE_VARIABLE, "")
        if not address.startswith("s3://"):
            raise BadInput(
                f"{STORE_VARIABLE} does not name a bucket",
                expected="s3://bucket/prefix",
                found=address or "nothing",
                hint="set the variable; a store in a folder needs no preparation",
            )
        sys.stdout.write(prepare(address) + "\n")
    except RestitchError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
