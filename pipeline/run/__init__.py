"""One run: configuration, plan, preflight checks, forecast, workflow and jobs."""
