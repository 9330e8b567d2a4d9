"""A real OpenID Connect provider, Canaille, with people in memory. Its parameters come as JSON on the command line."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from canaille import create_app
from canaille.app import models
from canaille.backends import Backend
from canaille.backends.memory.backend import MemoryBackend
from werkzeug.serving import run_simple


class Memory(MemoryBackend):  # type: ignore[misc]  # Canaille has no types
    """Finds what has all wanted values; Canaille's own finds what has one of them, such as any code of the same client."""

    __module__ = MemoryBackend.__module__  # Canaille looks for the models beside it

    def do_query(self, model: Any, *args: Any, **wanted: Any) -> list[Any]:
        found = super().do_query(model, *args, **wanted)
        for name, value in wanted.items():
            ids = {one.id for one in super().do_query(model, **{name: value})}
            found = [one for one in found if one.id in ids]
        return list(found)


def main(port: int, client: dict[str, Any], people: list[dict[str, Any]]) -> None:
    """Serve on `port` until killed."""
    app = create_app(
        {
            "SECRET_KEY": "a secret of tests",
            "SERVER_NAME": f"127.0.0.1:{port}",
            "PREFERRED_URL_SCHEME": "http",
            "CANAILLE": {"DATABASE": "memory", "SMTP": None, "LOGGING": None},
        },
        backend=Memory({}),
    )
    with app.app_context():
        backend = Backend.instance
        groups: dict[str, Any] = {}
        for person in people:
            name = person["name"]
            user = models.User(
                user_name=name,
                family_name=name,
                formatted_name=name.title(),
                emails=[f"{name}@example.org"],
                password=person["password"],
            )
            backend.save(user)
            for group in person["groups"]:
                groups.setdefault(group, []).append(user)
        for name, members in groups.items():
            backend.save(models.Group(display_name=name, members=members))
        registered = models.Client(
            client_name="Nexus",
            client_uri="http://127.0.0.1",  # of a trusted domain: nobody is asked for consent
            grant_types=["authorization_code"],
            response_types=["code"],
            token_endpoint_auth_method="client_secret_basic",
            scope=["openid", "profile", "email", "groups"],
            **client,
        )
        backend.save(registered)
        registered.audience = [registered]
        backend.save(registered)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    run_simple("127.0.0.1", port, app, threaded=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
