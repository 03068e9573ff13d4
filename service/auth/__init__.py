"""Who may call what: bearer tokens, their scopes and limits."""
