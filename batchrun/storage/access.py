"""Connects to an object store, the way each vendor's own tools are configured: environment, profiles, metadata servers.

pyarrow reaches S3, Google Cloud Storage, Azure and HDFS; fsspec, if it is installed, the rest.
"""

import configparser
import functools
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pyarrow as pa
import pyarrow.fs as pafs

from batchrun.errors import JobError
from batchrun.job.settings import Storage
from batchrun.storage import failures
from batchrun.storage.urls import Url

MAX_ATTEMPTS = 6
"""Requests to S3 that are tried before one is given up; AWS_MAX_ATTEMPTS replaces it. With the SDK's waits of 1, 2, 4 …
seconds times a random share, a store may be away for about 15 s.
"""

CONNECT_TIMEOUT_S = 10.0  # the SDK's own is 1 s
SILENCE_S = 60.0  # the SDK's own 3 s break off a store that is slow to answer
RETRY_S = 15  # Google's own default is a quarter of an hour

Access = Storage
"""How to reach the stores of a job, where the environment does not say it: the job's [storage] table. Under this name
for packages that know no jobs, such as `source`."""

ENVIRONMENT = Access()
"""Nothing but what the environment says."""

Environ = Mapping[str, str]


def connect(url: Url, access: Access = ENVIRONMENT, environ: Environ | None = None) -> tuple[pafs.FileSystem, str]:
    """The file system that the URL is in, and the path there: the URL's own, so that the names of files that are found
    become URLs again. Sends nothing yet, except that S3 may look for a region.

    Raises:
        JobError: a setting or a package is missing.
    """
    given = dict(url.options)
    chosen = Access(
        given.get("endpoint_override") or access.endpoint,
        given.get("region") or access.region,
        access.anonymous or given.get("anonymous", "").lower() in ("true", "1"),
    )
    if (scheme := given.get("scheme")) and chosen.endpoint and "://" not in chosen.endpoint:
        chosen = msgspec.structs.replace(chosen, endpoint=f"{scheme}://{chosen.endpoint}")
    environ = os.environ if environ is None else environ
    if url.kind == "s3":
        return _s3(chosen, environ, url.path.partition("/")[0]), url.path
    if url.kind == "gs":
        return _gcs(chosen, environ), url.path
    if url.kind == "abfs":
        # abfss://container@account.dfs…/path, or az://container/path, where the environment names the account
        first, _, path = url.path.partition("/")
        container, _, host = first.partition("@")
        return _azure(chosen, environ, host.partition(".")[0]), f"{container}/{path}" if path else container
    if url.kind in ("hdfs", "viewfs"):
        with failures.reading(url):
            filesystem, path = pafs.FileSystem.from_uri(str(url))
        return filesystem, path
    return _fsspec(url)


# ── S3 ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _s3(access: Access, environ: Environ, bucket: str) -> pafs.FileSystem:
    """boto3's order: the URL and the job, AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, then the profile's endpoint_url."""
    profile = _aws_profile(environ)
    endpoint = (
        access.endpoint
        or environ.get("AWS_ENDPOINT_URL_S3")
        or environ.get("AWS_ENDPOINT_URL")
        or profile.get("endpoint_url")
    )
    region = (
        access.region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or profile.get("region") or None
    )
    anonymous = access.anonymous or environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("true", "yes", "1")
    if region is None and endpoint is not None:
        region = "us-east-1"  # what other S3 servers expect
    region = region or bucket_region(bucket)
    host = urlsplit(_with_scheme(endpoint, "https")).hostname if endpoint else f"s3.{region}.amazonaws.com"
    proxy = _proxy(environ, "http" if (endpoint or "").startswith("http://") else "https", host or "")
    options: dict[str, Any] = {}
    version = int(pa.__version__.partition(".")[0])
    if version >= 21:  # a small object takes one request then, and leaves no upload behind when the process is killed
        options["allow_delayed_open"] = True
    if re.search(r"addressing_style\s*=\s*virtual", profile.get("s3", "")):
        options["force_virtual_addressing"] = True
    if authorities := environ.get("AWS_CA_BUNDLE") or profile.get("ca_bundle"):
        if version < 21:
            raise JobError(f"AWS_CA_BUNDLE: needs pyarrow 21, and this is {pa.__version__}; pip install -U pyarrow")
        if not Path(authorities).is_file():
            raise JobError(f"AWS_CA_BUNDLE: {authorities} is not a file")
        options["tls_ca_file_path"] = authorities
    if proxy is not None:
        options["proxy_options"] = proxy
    attempts = environ.get("AWS_MAX_ATTEMPTS", "")
    tries = max(1, int(attempts)) if attempts.isdigit() else MAX_ATTEMPTS
    return _s3_connection(endpoint, region, anonymous, tries, tuple(options.items()))


def _proxy(environ: Environ, scheme: str, host: str) -> str | None:
    """The proxy that the environment names for the host, as other tools read it; None: there is none."""
    name = f"{scheme}_proxy"
    if not (proxy := environ.get(name) or environ.get(name.upper())):
        return None
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # 20 ms; the stubs lack it

    excepted = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    if host in ("localhost", "127.0.0.1", "::1") or proxy_bypass_environment(host, {"no": excepted}):
        return None
    return _with_scheme(proxy, "http")


@functools.cache
def bucket_region(bucket: str) -> str | None:
    """The region that S3 names for the bucket; None if it can't be found, as behind a firewall."""
    try:
        return pafs.resolve_s3_region(bucket)
    except OSError:
        return None


@functools.cache
def _s3_connection(
    endpoint: str | None, region: str | None, anonymous: bool, attempts: int, options: tuple[tuple[str, Any], ...]
) -> pafs.FileSystem:
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        anonymous=anonymous,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=SILENCE_S,
        background_writes=False,  # these read a local file faster than it is sent: memory would hold all of it
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        **dict(options),
    )


def _aws_profile(environ: Environ) -> Mapping[str, str]:
    """The settings of the chosen profile in the AWS tools' configuration file."""
    name = environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE") or "default"
    home = environ.get("HOME", "~")
    file = Path(environ.get("AWS_CONFIG_FILE") or f"{home}/.aws/config").expanduser()
    config = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        config.read(file, "utf-8")
    except (OSError, configparser.Error, UnicodeDecodeError):
        return {}
    section = "default" if name == "default" else f"profile {name}"
    return config[section] if config.has_section(section) else {}


# ── Google, Azure, others ─────────────────────────────────────────────────────────────────────────────────────────────


def _gcs(access: Access, environ: Environ) -> pafs.FileSystem:
    emulator = environ.get("STORAGE_EMULATOR_HOST")
    endpoint = access.endpoint or emulator
    parts = urlsplit(_with_scheme(endpoint or "", "https" if emulator is None else "http"))
    return pafs.GcsFileSystem(
        anonymous=access.anonymous or (endpoint is not None and endpoint == emulator),
        endpoint_override=parts.netloc or None,
        scheme=parts.scheme if endpoint else "https",
        retry_time_limit=timedelta(seconds=RETRY_S),
    )


def _azure(access: Access, environ: Environ, named: str) -> pafs.FileSystem:
    """The account that the URL names, else that of the environment; a key there comes before a SAS token."""
    account = named or environ.get("AZURE_STORAGE_ACCOUNT") or environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not account:
        raise JobError(
            "no Azure storage account is named: set AZURE_STORAGE_ACCOUNT, or write "
            "abfss://container@account.dfs.core.windows.net/folder"
        )
    key = environ.get("AZURE_STORAGE_KEY") or environ.get("AZURE_STORAGE_ACCOUNT_KEY")
    sas = environ.get("AZURE_STORAGE_SAS_TOKEN")
    settings: dict[str, Any] = {}
    if key:
        settings["account_key"] = key
    elif sas:
        settings["sas_token"] = sas if sas.startswith("?") else f"?{sas}"
    if access.endpoint:
        parts = urlsplit(_with_scheme(access.endpoint, "https"))
        for service in ("blob", "dfs"):
            settings |= {f"{service}_storage_authority": parts.netloc, f"{service}_storage_scheme": parts.scheme}
    return pafs.AzureFileSystem(account, **settings)


def _with_scheme(address: str, scheme: str) -> str:
    return address if "://" in address else f"{scheme}://{address}"


_PACKAGES = {"hf": "huggingface_hub"}
"""The packages that fsspec needs for a scheme, where their names differ from those in fsspec's own message."""


def _fsspec(url: Url) -> tuple[pafs.FileSystem, str]:
    """The file system that fsspec has for the scheme, and the path there, which may begin with "/"."""
    try:
        import fsspec
    except ImportError as error:
        packages = f"fsspec {_PACKAGES[url.kind]}" if url.kind in _PACKAGES else "fsspec"
        raise JobError(f"{url}: pyarrow has no file system for {url.scheme}://; pip install {packages}") from error
    try:
        with failures.reading(url):
            filesystem, path = fsspec.core.url_to_fs(f"{url.kind}://{url.path}")
    except ImportError as error:
        package = _PACKAGES.get(url.kind)
        hint = f"pip install {package}" if package else str(error)
        raise JobError(f"{url}: fsspec needs another package for {url.scheme}://; {hint}") from error
    except ValueError as error:
        raise JobError(f"{url}: neither pyarrow nor fsspec knows {url.scheme}://") from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path  # type: ignore[abstract]  # only by its stubs
