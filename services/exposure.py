"""What `recap serve` opens to others, from its options: keys, quotas, TLS, and what to say about it."""

import ssl

from rich.console import Console

from services.common.settings import API_KEY_VARIABLE, Access, Quota, Tls, api_key_from
from services.common.tls import TlsError, client_context, server_context
from services.options import ServeArgs

console = Console(stderr=True, highlight=False)


def access(args: ServeArgs) -> Access:
    """Keys, quotas and connections. Raises ValueError for a bound that means nothing."""
    quota = Quota(args.rate, None, args.bytes_per_s, args.in_flight, args.sessions)
    return Access(
        args.keys, quota, args.max_sessions, args.address_connections, args.max_connections, args.request_timeout
    )


def tls(args: ServeArgs) -> Tls | None:
    """The certificate and key, tried before anything is loaded. Raises TlsError."""
    if args.tls_cert is None and args.tls_key is None:
        return None
    if args.tls_cert is None or args.tls_key is None:
        raise TlsError("expected --tls-cert and --tls-key together, got one of them")
    pair = Tls(args.tls_cert, args.tls_key)
    server_context(pair)
    return pair


def critic_tls(args: ServeArgs) -> ssl.SSLContext | None:
    """For a critic at `wss://`. The one beside us shows our own certificate, whose names need not hold the loopback."""
    if args.critic_url is None or not args.critic_url.startswith("wss:"):
        return None
    return client_context(args.critic_ca, own=args.critic_ca is not None and args.critic_ca == args.tls_cert)


def warn(args: ServeArgs) -> None:
    """Say what is open to others."""
    if args.host in ("127.0.0.1", "::1", "localhost"):
        return
    if args.keys is None and api_key_from() is None:
        console.print(
            f"{args.what}: open to everyone who reaches {args.host}; ask for a key with --keys or {API_KEY_VARIABLE}",
            style="yellow",
        )
    elif args.tls_cert is None:
        console.print(f"{args.what}: keys cross the network unencrypted; add --tls-cert and --tls-key", style="yellow")
    if args.what == "policy" and args.groot_port is not None:
        console.print("groot: this protocol has no TLS; keep the port on a network of your own", style="yellow")
