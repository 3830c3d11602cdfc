"""Decisions: which plan to try next, which trial to stop."""
