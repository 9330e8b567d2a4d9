"""OpenAI's Responses API on top of durable chat jobs.

| file | is |
|---|---|
| `items.py`, `asking.py` | pure: a request becomes a chat request |
| `shape.py`, `parts.py`, `answering.py` | pure: a chat stream becomes response events and the final response |
| `kept.py` | what is kept of a response |
| `service.py` | create, retrieve, cancel, delete, list the input |
| `watching.py`, `sending.py` | a response's events, and how a caller gets them |
| `reading.py` | a request from its HTTP request |
"""
