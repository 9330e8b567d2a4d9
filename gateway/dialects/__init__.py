"""APIs of others over the same queue, jobs, limits and usage: each folder translates one into OpenAI's chat, and back."""
