"""Traces and metrics to an OpenTelemetry collector: the one door to OpenTelemetry, which a server does without."""
