"""`nexus env`: the variables with which OpenAI's SDKs find the running gateway."""

from __future__ import annotations

import shlex

from cli import options
from cli.errors import ConsoleError
from cli.gateway_client import find_target
from cli.stack.data_dir import data_dir_from


def env(
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
) -> None:
    """Print OPENAI_BASE_URL and OPENAI_API_KEY of the running stack for a shell: eval "$(nexus env)"."""
    target = find_target(url, options.chosen_key(key, key_file), data_dir_from(data_dir))
    if not target.key:
        raise ConsoleError(
            f"There is no key for {target.url}: no `nexus up` runs on {data_dir_from(data_dir).root}. "
            "Start one, pass the --data-dir of a running one, or set NEXUS_URL and NEXUS_API_KEY."
        )
    print(format_exports(target.url, target.key))


def format_exports(url: str, key: str) -> str:
    """Return one line that sets both variables in any POSIX shell."""
    return f"export OPENAI_BASE_URL={shlex.quote(url + '/v1')} OPENAI_API_KEY={shlex.quote(key)}"
