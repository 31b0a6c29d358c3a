"""Ask the server in this container one question: ``ask.py QUESTION [API-KEY-FILE]``."""

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

URL = os.environ.get("CUSPRUN_URL", "http://127.0.0.1:8000")


def main() -> int:
    """Print the answer; the key is read from the file, or from $CUSPRUN_API_KEY."""
    question, *rest = sys.argv[1:] or ["What is 7 x 8?"]
    key = os.environ.get("CUSPRUN_API_KEY", "")
    lines = Path(rest[0]).read_text(encoding="utf-8").split() if rest else key.split()
    headers = {"Content-Type": "application/json"}
    if lines:
        headers["Authorization"] = f"Bearer {lines[0]}"
    body = json.dumps({"messages": [{"role": "user", "content": question}], "max_tokens": 256}).encode()
    request = urllib.request.Request(f"{URL}/v1/chat/completions", body, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=300) as answer:
            print(json.load(answer)["choices"][0]["message"]["content"])
    except urllib.error.HTTPError as error:
        print(f"error: the server refused: {error.read().decode('utf-8', 'replace')}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: the server does not answer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
