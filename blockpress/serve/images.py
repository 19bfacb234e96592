"""Images by address: fetched only where the server allows it, and never from this machine's own networks.

The address is resolved once and the connection goes to what it resolved to, so that a name cannot point elsewhere
between the check and the call (DNS rebinding). Redirects are followed by hand and checked alike.

Invariant: without `fetch_images` no packet leaves; with it, none goes to an address that is not public.
"""

from __future__ import annotations

import base64
import ipaddress
import socket
from urllib.parse import urljoin, urlsplit

import httpx

from blockpress.serve.errors import _FieldError
from blockpress.serve.options import ServeOptions

SECONDS = 10.0
MOST_REDIRECTS = 3


def fetched(address: str, field: str, options: ServeOptions) -> str:
    """An image at an http or https address, as a `data:` address.

    Raises:
        _FieldError: the server fetches none, the address is not public, or there is no image.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not options.fetch_images:
        raise _FieldError(
            field,
            f"{field} is {address!r:.80}, and this server fetches no images",
            "send it as data:image/png;base64,..., or start the server with --fetch-images",
        )
    for _ in range(MOST_REDIRECTS + 1):
        status, headers, content = _get(address, field, options)
        if status not in (301, 302, 303, 307, 308):
            break
        address = urljoin(address, headers.get("location", ""))
    kind = headers.get("content-type", "").partition(";")[0].strip()
    if status != 200 or not kind.startswith("image/"):
        raise _FieldError(field, f"{field}: {address!r:.80} gave status {status}, {kind!r}", "give an image")
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _get(address: str, field: str, options: ServeOptions) -> tuple[int, httpx.Headers, bytes]:
    parts = urlsplit(address)
    host = parts.hostname or ""
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise _FieldError(field, f"{field}: {host!r:.80} cannot be resolved: {error}", "check the address") from error
    ips = [ipaddress.ip_address(entry[4][0]) for entry in found]
    if parts.scheme not in ("http", "https") or not ips or not all(ip.is_global and not ip.is_multicast for ip in ips):
        raise _FieldError(field, f"{field}: {host!r:.80} is not a public address", "send the image as data:")
    ip = f"[{ips[0]}]" if ips[0].version == 6 else str(ips[0])
    target = parts._replace(netloc=f"{ip}:{port}").geturl()
    try:
        with (
            httpx.Client(timeout=SECONDS, follow_redirects=False, trust_env=False) as client,
            client.stream(
                "GET",
                target,
                headers={"host": parts.netloc.rpartition("@")[2]},
                extensions={"sni_hostname": host},
            ) as answer,
        ):
            content = bytearray()
            for chunk in answer.iter_bytes():
                content += chunk
                if len(content) > options.max_body:
                    raise _FieldError(field, f"{field} has more than {options.max_body} bytes", "send a smaller image")
            return answer.status_code, answer.headers, bytes(content)
    except httpx.HTTPError as error:
        raise _FieldError(field, f"{field}: {address!r:.80} cannot be fetched: {error}", "check the address") from error
