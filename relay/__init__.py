"""relay moves streams of bytes to many sockets and files without carrying them."""

__version__ = "0.1.0"
