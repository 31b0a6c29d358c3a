"""The load test of an endpoint that speaks OpenAI's interface, whoever serves it.

``events`` reads server-sent events, ``timeline`` turns the moments of one request into its record (both
pure), ``probe`` finds out what an endpoint takes, ``client`` and ``transport`` talk to it, ``levels`` keeps a
level of load, ``collect`` interleaves endpoints, ``summary`` and ``table`` say what was found.
"""
