"""Keeps sessions in a store: what is written when, how they come back, and which answers wait for it."""
