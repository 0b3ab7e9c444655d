"""Scripts that other interpreters run: they import the standard library, the peer's packages and each other, nothing of
ours. Run by path, so that a peer's environment sees this folder and not the packages beside it."""
