"""Anthropic's Messages API: a translation of chat.

| module | responsibility |
|---|---|
| `content`, `conversation`, `tools`, `to_chat` | translate a request into a chat request (pure) |
| `blocks`, `from_chat`, `results` | translate a chat answer into a message: whole, as events, as a job's result (pure) |
| `errors`, `rate_headers` | translate errors and headers (pure) |
| `message_batches` | translate batches and their results (pure) |
| `models`, `pages` | list models and batches (pure) |
| `token_estimate` | estimate tokens that no server has counted (pure) |
| `endpoint` | the endpoints whose requests are translated |
| `answers` | translate an answer while it is sent |
| `asgi_app` | serve the requests of Anthropic's clients |
"""
