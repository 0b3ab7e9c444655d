"""TLS on the robot's side: which certificates are trusted, and what to do when a connection fails."""

import os
import ssl
from pathlib import Path

CA_VARIABLE = "RECAP_TLS_CA"


def client_context(url: str, ca: Path | str | None = None) -> ssl.SSLContext | None:
    """For a `wss://` url; None for `ws://`. Certificates are always checked, and that they are for the url's host.

    ca: file of the CAs to trust (PEM), None = the one in the environment variable RECAP_TLS_CA, else those of the
    system. Raises OSError with the file's name.
    """
    if not url.startswith("wss:"):
        return None
    trusted = ca or os.environ.get(CA_VARIABLE) or None
    try:
        return ssl.create_default_context(cafile=trusted)
    except (OSError, ssl.SSLError) as error:
        raise OSError(f"{trusted}: expected a file of CA certificates in PEM form ({error})") from error


def advice(url: str, error: BaseException, what: str) -> str:
    """What may be wrong when a connection to `url`, where there should be `what`, fails: the end of a sentence."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "its certificate is not trusted; name the file of its CA with --tls-ca, or in RECAP_TLS_CA"
    if isinstance(error, ssl.SSLError):
        return f"is the {what} running there, and with TLS (else ws://)?"
    if "HTTP 401" in str(error) or "HTTP 403" in str(error):
        return "set a key that it takes, with --api-key or in RECAP_API_KEY"
    reset = isinstance(error, ConnectionResetError | BrokenPipeError) or "HTTP response" in str(error)
    if url.startswith("ws:") and reset:  # how a TLS port takes plain text
        return f"is the {what} running there, and without TLS (else wss://)?"
    return f"is the {what} running there?"
