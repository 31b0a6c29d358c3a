"""Model folders: what they hold, reading and writing them piece by piece, and GGUF import."""
