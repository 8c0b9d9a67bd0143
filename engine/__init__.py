"""The model, its scheduler and the one thread that owns them. Token ids in, token ids out; no JSON, no sockets."""
