"""TLS of the services: one certificate and key, for every port that can have it."""

import ssl
import stat
from pathlib import Path
from typing import Any

from services.common.logs import get_logger
from services.common.settings import Tls

log = get_logger("access")


class TlsError(ValueError):
    """A certificate or key cannot be used; names the file and says why."""


def server_context(tls: Tls) -> ssl.SSLContext:
    """What a server listens with: TLS 1.2 or newer. Raises TlsError."""
    for path, what in ((tls.cert, "certificate"), (tls.key, "key")):
        try:
            text = path.read_bytes()
        except OSError as error:
            raise TlsError(f"{path}: cannot read the TLS {what} ({error.strerror})") from error
        if b"-----BEGIN" not in text:
            raise TlsError(f"{path}: expected a TLS {what} in PEM form (-----BEGIN ...), got something else")
        if b"ENCRYPTED" in text:
            raise TlsError(f"{path}: expected a TLS key without a password (`openssl pkey` removes it)")
    if tls.key.stat().st_mode & stat.S_IROTH:
        log.warning("every account of this machine can read the TLS key", file=str(tls.key), fix="chmod 600")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(tls.cert, tls.key)
    except ssl.SSLError as error:
        fit = "they do not belong together" if "MISMATCH" in str(error) else "not a PEM certificate and its PEM key"
        raise TlsError(f"{tls.cert} and {tls.key}: {fit} ({error.reason or error})") from error
    return context


def grpc_credentials(tls: Tls) -> Any:
    """The same for a gRPC server."""
    import grpc

    server_context(tls)  # its errors have words, gRPC's do not
    return grpc.ssl_server_credentials([(tls.key.read_bytes(), tls.cert.read_bytes())])


def client_context(ca: Path | None, *, own: bool = False) -> ssl.SSLContext:
    """For calling a service whose CA is `ca`, None = those of the system. own: `ca` is the very certificate that the
    other side shows, under whatever name it is called. Raises TlsError."""
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise TlsError(f"{ca}: expected certificates in PEM form ({error})") from error
    if own:
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
