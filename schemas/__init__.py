"""What is said between the parts of Nexus: jobs, events, errors, presence, OpenAI requests."""
