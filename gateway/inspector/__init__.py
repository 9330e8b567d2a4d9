"""The request inspector: keeps redacted requests and answers of a team, while an administrator has turned that on."""
