"""The messages and records that the parts of Nexus exchange: jobs, events, errors, presence, OpenAI requests."""
