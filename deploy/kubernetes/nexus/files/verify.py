"""What `helm test` runs: is the gateway ready, does it take the key, and does a model answer?"""

import json
import os
import sys
import urllib.error
import urllib.request
from typing import Any

URL, MODEL = os.environ["NEXUS_URL"], os.environ["NEXUS_MODEL"]
HEADERS = {"authorization": f"Bearer {os.environ['NEXUS_KEY']}", "content-type": "application/json"}


def call(path: str, body: dict[str, Any] | None = None) -> Any:
    """Return the answer's JSON. Without one, end the test and say why."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(URL + path, data, HEADERS), timeout=120) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        sys.exit(f"{path}: {error.code} {error.read(2000).decode(errors='replace')}")
    except OSError as error:
        sys.exit(f"{path}: {error}")


ready = call("/readyz")
print("readyz:", ready["status"])
for part, state in ready.get("parts", {}).items():
    if not state["ok"]:
        print(f"  {part}: {state['error']}")
models = [model["id"] for model in call("/v1/models")["data"]]
print("models:", ", ".join(models) or "none")
if MODEL:
    answer = call("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}]})
    print(f"{MODEL}:", answer["choices"][0]["message"]["content"])
