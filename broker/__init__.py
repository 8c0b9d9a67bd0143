"""Sockets, sessions, protocols. The only package that knows clients."""
