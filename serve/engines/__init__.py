"""The engines that serve artifacts, one module each behind one table."""
