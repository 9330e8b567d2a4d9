"""Any server that speaks OpenAI's API: llama.cpp, vLLM, LM Studio, speech and image servers, a remote one with a key.

Options: `api_path`, where the API lies below the URL (default: the URL's own end where it looks like `/v1`, else `/v1`); `capabilities` and
`capabilities.PATTERN`, what the models serve, as adapter_kit/openai/capabilities.py describes; `lacks`, parameters that the server does not
honor (`n+logit_bias+parallel_tool_calls+tool_choice`), beside those that probes find.
"""

from __future__ import annotations

from workers.adapter_kit.openai.backend import OpenAICompatibleBackend


class OpenAIBackend(OpenAICompatibleBackend):
    """Serve an OpenAI-compatible server of any kind."""

    name = "openai"
