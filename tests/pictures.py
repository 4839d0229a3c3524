"""Images for tests: the samples, and the smallest bytes that are taken for one of each type."""

import base64
from pathlib import Path

SAMPLES = Path(__file__).parent.parent / "sample_inputs" / "pictures"

PNG = b"\x89PNG\r\n\x1a\n"
OF_TYPE = {
    "image/png": PNG + b"png",
    "image/jpeg": b"\xff\xd8\xffjpeg",
    "image/gif": b"GIF89agif",
    "image/webp": b"RIFF\x04\x00\x00\x00WEBPwebp",
}


def data_url(content: bytes, media_type: str = "image/png") -> str:
    """The content as a data URL."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
