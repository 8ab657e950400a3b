"""Schedule, run, deliver: one engine for each model version."""
