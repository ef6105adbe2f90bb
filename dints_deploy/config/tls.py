"""TLS contexts of a configuration: TLS 1.2 at least, certificates always checked."""

from __future__ import annotations

import ssl

from dints_deploy.config.fields import TLS
from dints_deploy.errors import UsageError


def server_context(tls: TLS) -> ssl.SSLContext:
    """Return the context of a port: with an authority, only clients whose certificate it signed are let in."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    if tls.authority is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return _loaded(context, tls)


def client_context(tls: TLS) -> ssl.SSLContext:
    """Return the context for calling others: their certificate must be signed, for the host that is called."""
    context = ssl.create_default_context(cafile=None if tls.authority is None else str(tls.authority))
    return _loaded(context, tls)


def _loaded(context: ssl.SSLContext, tls: TLS) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if tls.authority is not None:
            context.load_verify_locations(tls.authority)
        if tls.certificate is not None:
            context.load_cert_chain(tls.certificate, tls.key)
    except (OSError, ssl.SSLError) as error:
        named = " ".join(str(path) for path in (tls.certificate, tls.key, tls.authority) if path)
        reason = error.strerror or type(error).__name__
        raise UsageError("config-invalid", f"expected certificates and keys in {named}, found: {reason}") from error
    return context
