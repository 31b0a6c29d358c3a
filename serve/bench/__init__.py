"""Before against after: load time, latency, speed and memory of two model files, measured fairly."""
