"""The gateway: it answers OpenAI-compatible requests with jobs for workers, at once or durably."""
