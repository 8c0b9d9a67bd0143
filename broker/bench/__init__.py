"""`homeport bench`: clients that measure a running daemon from outside, over its public protocol only."""
