"""How objects are written to a bucket, and how much of them is kept here: by variables.

Encryption and storage class are the server's to do; they change no byte that is read back.
A value that cannot work is refused before anything is sent, and never repeated in a message
where it could be a secret.
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
# Those from which an object can be read at once.
_CLASSES = (
    *("STANDARD", "STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER_IR"),
    *("REDUCED_REDUNDANCY", "EXPRESS_ONEZONE", "OUTPOSTS"),
)


def write_settings(name: str) -> dict[str, str]:
    """The parameters with which boto3 writes the object of this name.

    The storage class is for blobs alone: heads and keys are small, read often and changed.

    Raises:
        BadInput: a variable has a value that cannot work.
    """
    found = {}
    encryption, key = os.environ.get(ENCRYPTION_VARIABLE), os.environ.get(KEY_VARIABLE)
    if key and not encryption:
        encryption = "aws:kms"
    if encryption:
        if encryption not in _ENCRYPTIONS or (key and encryption == "AES256"):
            raise BadInput(
                f"{ENCRYPTION_VARIABLE} names no encryption"
                + (" that takes a key" if encryption in _ENCRYPTIONS else ""),
                expected=f"{', '.join(_ENCRYPTIONS)}; {KEY_VARIABLE} goes with the latter two",
                hint=f"correct or unset {ENCRYPTION_VARIABLE} and {KEY_VARIABLE}",
            )
        found["ServerSideEncryption"] = encryption
    if key:
        found["SSEKMSKeyId"] = key
    kept = os.environ.get(CLASS_VARIABLE)
    if kept and kept not in _CLASSES:
        raise BadInput(
            f"{CLASS_VARIABLE} names no class from which an object can be read at once",
            expected=", ".join(_CLASSES),
            hint=f"correct or unset {CLASS_VARIABLE}",
        )
    if kept and name.startswith("blobs/"):
        found["StorageClass"] = kept
    return found


def cache_limit() -> int | None:
    """How many bytes of downloaded objects are kept on this machine; None without a limit.

    Raises:
        BadInput: the variable holds no size.
    """
    text = os.environ.get(CACHE_VARIABLE)
    try:
        return parse_size(text) if text else None
    except BadInput:
        raise BadInput(
            f"{CACHE_VARIABLE} is no size",
            expected="for instance 50GB or 500MB",
            hint="correct it, or unset it to keep everything that was downloaded",
        ) from None


def single_writer() -> bool:
    """Whether the deployment promises that one process at a time writes to the store."""
    return os.environ.get(WRITER_VARIABLE, "") not in ("", "0")
