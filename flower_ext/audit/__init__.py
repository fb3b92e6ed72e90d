"""Audits that a user can run: whether a run leaks more than its accountant says."""
