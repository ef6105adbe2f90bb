"""Ask the daemon of this container whether it can take studies; end with 0 when it can, with 1 and its words when not.

python healthcheck.py [CONFIG]      CONFIG is /etc/dints-deploy/appliance.toml by default

Only the standard library is imported: it runs every few seconds.
"""

from __future__ import annotations

import http.client
import ssl
import sys
import tomllib
from pathlib import Path
from typing import Any

SECONDS = 8.0


def main(config: str = "/etc/dints-deploy/appliance.toml") -> int:
    """Print what the daemon says and return the exit code."""
    try:
        status, body = ask(tomllib.loads(Path(config).read_text()).get("http", {}))
    except (OSError, http.client.HTTPException, tomllib.TOMLDecodeError) as error:
        print(f"no answer: {error}")
        return 1
    print(body.strip())
    return 0 if status == 200 else 1


def ask(settings: dict[str, Any]) -> tuple[int, str]:
    """Return status and body of /readyz as the configuration's [http] table places it."""
    address = settings.get("address", "127.0.0.1")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    port = int(settings.get("port", 9113))
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    if tls := settings.get("tls"):
        connection = http.client.HTTPSConnection(
            host, port, timeout=SECONDS, context=own_certificate(tls["certificate"])
        )
    headers = {}
    if token_file := settings.get("token_file"):
        headers["Authorization"] = f"Bearer {Path(token_file).read_text().strip()}"
    connection.request("GET", "/readyz", headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def own_certificate(path: str) -> ssl.SSLContext:
    """Trust the daemon's own certificate and no other; its name is that of the network outside."""
    context = ssl.create_default_context(cafile=path)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
