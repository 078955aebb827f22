"""Settings of a store in a bucket, from environment variables.

The server applies encryption and storage class; they change no byte that is read back. An
invalid value is refused before anything is sent, and no message repeats a key.
"""

import os

from restitch.merging.errors import BadInput
from restitch.registry.sizes import parse_size

ENCRYPTION_VARIABLE = "RESTITCH_S3_ENCRYPTION"
KEY_VARIABLE = "RESTITCH_S3_KMS_KEY"
CLASS_VARIABLE = "RESTITCH_S3_STORAGE_CLASS"
CACHE_VARIABLE = "RESTITCH_CACHE_SIZE"
WRITER_VARIABLE = "RESTITCH_SINGLE_WRITER"

_ENCRYPTIONS = ("AES256", "aws:kms", "aws:kms:dsse")
# The classes from which an object can be read at once.
_CLASSES = (
    *("STANDARD", "STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER_IR"),
    *("REDUCED_REDUNDANCY", "EXPRESS_ONEZONE", "OUTPOSTS"),
)


def write_settings(name: str) -> dict[str, str]:
    """The parameters with which boto3 writes the object of this name.

    The storage class applies to blobs only: other objects are small, read often or changed.

    Raises:
        BadInput: a variable has an invalid value.
    """
    parameters = {}
    encryption, key = os.environ.get(ENCRYPTION_VARIABLE), os.environ.get(KEY_VARIABLE)
    if key and not encryption:
        encryption = "aws:kms"
    if encryption:
        if encryption not in _ENCRYPTIONS or (key and encryption == "AES256"):
            raise BadInput(
                f"{ENCRYPTION_VARIABLE} is not the name of an encryption"
                + (" that takes a key" if encryption in _ENCRYPTIONS else ""),
                expected=f"{', '.join(_ENCRYPTIONS)}; {KEY_VARIABLE} goes with the latter two",
                hint=f"correct or unset {ENCRYPTION_VARIABLE} and {KEY_VARIABLE}",
            )
        parameters["ServerSideEncryption"] = encryption
    if key:
        parameters["SSEKMSKeyId"] = key
    storage_class = os.environ.get(CLASS_VARIABLE)
    if storage_class and storage_class not in _CLASSES:
        raise BadInput(
            f"{CLASS_VARIABLE} is not a storage class from which objects can be read at once",
            expected=", ".join(_CLASSES),
            hint=f"correct or unset {CLASS_VARIABLE}",
        )
    if storage_class and name.startswith("blobs/"):
        parameters["StorageClass"] = storage_class
    return parameters


def cache_limit() -> int | None:
    """The bytes of downloaded objects that this machine may cache; None for no limit.

    Raises:
        BadInput: the variable is not a size.
    """
    text = os.environ.get(CACHE_VARIABLE)
    try:
        return parse_size(text) if text else None
    except BadInput:
        raise BadInput(
            f"{CACHE_VARIABLE} is not a size",
            expected="a size such as 50GB or 500MB",
            hint="correct it, or unset it to cache everything that is downloaded",
        ) from None


def single_writer() -> bool:
    """True if the deployment promises that one process at a time writes to the store."""
    return os.environ.get(WRITER_VARIABLE, "") not in ("", "0")
