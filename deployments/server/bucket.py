"""Make the bucket of `RESTITCH_STORE`, and make sure that its server keeps what merging needs.

    python -m restitch.deployments.server.bucket

Registrations at the same moment are told apart by conditional writes alone. A server that
takes them for plain ones would lose one of two and say nothing, so it is found out here: an
object beside the store is created twice and swapped twice, and the second has to be refused.
Again changes nothing.
"""

import os
import sys
from typing import Any

from restitch.merging.errors import BadInput, RestitchError
from restitch.registry.home import STORE_VARIABLE
from restitch.registry.s3.client import client, code_of, parse_address, s3_explained, status_of
from restitch.registry.s3.conditional_writes import keeps_conditions, refusal
from restitch.registry.s3.retries import with_retries

_THERE = ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")


def prepare(address: str) -> str:
    """Make the bucket unless it is there, and try conditional writes in it.

    Args:
        address: `s3://bucket/prefix`, as in `RESTITCH_STORE`.

    Returns:
        What was found, for people.

    Raises:
        BadInput: the address is not one.
        Unavailable: the server is away, refuses the account, or ignores conditions.
    """
    bucket, prefix = parse_address(address)
    with s3_explained(f"s3://{bucket}", "make the bucket"):
        made = _make(bucket)
    if not keeps_conditions(bucket, prefix):
        raise refusal(f"s3://{bucket}")
    return f"s3://{bucket}: {'made' if made else 'there'}, its server knows conditional writes"


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
    elsewhere: dict[str, Any] = {"CreateBucketConfiguration": {"LocationConstraint": region}}
    try:
        if region == "us-east-1":
            elsewhere = {}
        with_retries(lambda: client().create_bucket(Bucket=bucket, **elsewhere))
    except ClientError as error:
        if code_of(error) not in _THERE:  # another one made it at the same moment
            raise
        return False
    return True


def main() -> None:
    """Prepare what the environment names."""
    try:
        address = os.environ.get(STORE_VARIABLE, "")
        if not address.startswith("s3://"):
            raise BadInput(
                f"{STORE_VARIABLE} names no bucket",
                expected="s3://bucket/prefix",
                hint="a store in a folder needs no preparing",
            )
        sys.stdout.write(prepare(address) + "\n")
    except RestitchError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
