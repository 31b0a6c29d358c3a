"""OpenAI's interface as data and pure functions: requests, errors, streams."""
