"""An adapter's options as one string."""

from __future__ import annotations

import pytest

from workers.backend_options import join_options, split_options


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("slots=1,delay_ms=60000", {"slots": "1", "delay_ms": "60000"}),
        (" a = 1 ,, b=x=y", {"a": "1", "b": "x=y"}),
        ("workflow=C:\\comfy\\flow.json,title=it's \"mine\"", {"workflow": "C:\\comfy\\flow.json", "title": "it's \"mine\""}),
        ('"command=say -v a,b", output=wav', {"command": "say -v a,b", "output": "wav"}),
        ('"command=sh -c ""x, y"""', {"command": 'sh -c "x, y"'}),
    ],
)  # fmt: skip
def test_options_are_separated_by_commas_outside_of_quotes(text: str, options: dict[str, str]) -> None:
    assert split_options(text) == options


def test_whatever_an_option_holds_comes_back() -> None:
    """Commas, quotes and ends of lines too."""
    options = {"command": "sh -c \"a, b; 'c'\"", "prompt": "one\ntwo,\nthree", "empty": "", "plain": "x"}
    assert split_options(join_options(f"{name}={value}" for name, value in options.items())) == options
