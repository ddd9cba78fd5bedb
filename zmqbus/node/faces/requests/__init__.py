"""Requests as users see them: what `request` returns, and what `respond` and `responder` make."""
