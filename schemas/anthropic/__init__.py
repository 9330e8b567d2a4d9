"""What callers send to the routes of Anthropic's Messages API."""
