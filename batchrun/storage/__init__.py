"""The one seam to object stores: S3, Google Cloud Storage, Azure, and what fsspec reads, as files and folders.

`urls` says what a URL names, `access` connects to it, `objects` lists and reads, `uploads` writes. Everything above
works with `RemoteFile` and with URLs.
"""
