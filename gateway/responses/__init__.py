"""OpenAI's Responses API on top of durable chat jobs.

| module | responsibility |
|---|---|
| `input_items`, `to_chat` | translate a request into a chat request (pure) |
| `from_chat`, `output_items`, `resource` | translate a chat stream into response events and the response object (pure) |
| `references` | resolve items that a request refers to by id |
| `repository` | store responses and their conversations |
| `service` | create, retrieve, cancel and delete responses, and list their input items |
| `event_stream`, `http_response` | stream a response's events to a caller |
"""
