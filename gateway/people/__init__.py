"""People who sign in: OpenID Connect, sessions, roles and teams."""
