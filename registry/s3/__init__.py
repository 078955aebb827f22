"""The same store in an S3 bucket, with retries, transfers and conditional writes.

`home` opens it, and `sources.bucket` reads models through it.
"""
