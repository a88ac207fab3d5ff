"""The only file that knows fsspec, s3fs and boto3: object stores by URI. So far: is one there, and does it answer?"""

from __future__ import annotations

import os


def object_store_status() -> tuple[bool | None, str]:
    """(True answers, False configured but does not answer, None not configured; what to do)."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    configured = endpoint or any(os.environ.get(n) for n in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN"))
    if not configured:
        return (
            None,
            "not configured; needed only for s3:// data: set AWS_PROFILE or keys, and AWS_ENDPOINT_URL if not AWS",
        )
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    where = endpoint or "AWS S3"
    config = Config(connect_timeout=3, read_timeout=5, retries={"max_attempts": 1})
    try:
        buckets = boto3.client("s3", config=config).list_buckets()["Buckets"]
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "error")
        if code == "AccessDenied":
            return True, f"{where} answers; listing buckets is not allowed, which is no harm"
        return False, f"{where} refuses the credentials ({code})"
    except (BotoCoreError, ValueError) as error:
        return False, f"{where}: {str(error).splitlines()[0]}"
    return True, f"{where} answers, {len(buckets)} buckets"
